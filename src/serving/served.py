"""A solver at a server: the flags that name it, the form in which it is asked, and its answers as samples."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from src import parallel, runlog
from src.command.config import AskedFlags
from src.data.encoding import encode_prompt
from src.errors import UserError
from src.evaluation.evaluator import Sampler, SampleRequest, SamplerOutput
from src.evaluation.prompting import Prompting
from src.inference.sampling import Sampling
from src.serving.server_client import RemoteCompletion, RemoteRequest, Reply, Server, api_key, complete
from src.text.blocks import CODE_FORM
from src.text.tokenizer import Tokenizer, read_template_args

AT_SERVER = "server"  # the --chat_template that the server applies itself
OWN = ("base_url", "model_name", "api_key_env")  # flags of a server alone
# flags that a request has no word for, or a server decides
WITHOUT_EFFECT = ("model_type", "top_k", "min_p", "precision", "quantize", "compile", "isolation", "max_rounds",
                  "code_seconds", "choices", "tensor_parallel_size")


def check_flags(config: AskedFlags) -> bool:
    """Whether a server is asked. Raises UserError for flags that do not go together or would have no effect."""
    template = config.chat_template
    if config.backend != "openai":
        if own := [name for name in OWN if getattr(config, name)]:
            raise UserError(f"--{own[0]} says which server to ask; give --backend openai with it")
        if template == AT_SERVER:
            raise UserError(f"--chat_template {AT_SERVER} leaves the form to a server; give --backend openai with it")
        return False
    if not (config.base_url and config.model_name):
        raise UserError("--backend openai needs --base_url and --model_name")
    if lost := config.changed(WITHOUT_EFFECT):
        raise UserError(f"--{', --'.join(lost)} would have no effect at a server, since it is not in the OpenAI "
                        "protocol; set it there, or leave --backend openai out")
    if parallel.world_size() > 1:
        raise UserError("--backend openai needs one process; start it with python, not torchrun")
    if template == CODE_FORM:
        raise UserError(f"--chat_template {CODE_FORM} runs a solution's code as it is written, which no server can")
    if config.tokenizer_file and template in ("", AT_SERVER):
        raise UserError("--tokenizer_file with --backend openai puts prompts in the form of a --chat_template and in "
                        f"token ids; give none, file or a built-in name with it (found {template or 'nothing'})")
    if not config.tokenizer_file and template not in ("", "none", AT_SERVER):
        raise UserError(f"--chat_template {template} with --backend openai needs --tokenizer_file, the file or "
                        f"directory of the model's tokenizer; --chat_template {AT_SERVER} leaves the form to the "
                        "server")
    if config.template_args and not config.tokenizer_file:
        raise UserError("--template_args with --backend openai goes with a template that is filled in here; give "
                        "--tokenizer_file and --chat_template with it")
    if config.system_prompt not in ("", "none") and template in ("", "none"):
        raise UserError("--system_prompt with --backend openai is a message of a chat template; give --chat_template "
                        f"{AT_SERVER}, or --tokenizer_file and a template of this side, with it")
    api_key(config.api_key_env)
    return True


class ServedSolver:
    """What goes on with solutions at a server. A prompt is a text; with a tokenizer its ids in the tokenizer's
    template, as a model in this process would get them; with --chat_template server the message of a user."""

    coding = None  # no code is run

    def __init__(self, config: AskedFlags, prompting: Prompting, concurrency: int) -> None:
        """config: after check_flags(). concurrency: requests under way at once. Raises UserError for a tokenizer that
        does not open."""
        self.prompting, self.concurrency = prompting, concurrency
        self.chat_template, path = config.chat_template, config.tokenizer_file
        self.system_prompt = "" if config.system_prompt == "none" else config.system_prompt
        args = read_template_args(config.template_args)
        self.tokenizer = Tokenizer(Path(path), self.chat_template, args, self.system_prompt) if path else None
        self.server = Server(base_url=config.base_url, model_name=config.model_name,
                             api_key=api_key(config.api_key_env), chat=self.chat_template == AT_SERVER,
                             system_prompt=self.system_prompt,
                             stop_ids=tuple(sorted(self.tokenizer.stop_ids)) if self.tokenizer else ())
        self._warned: set[str] = set()

    @property
    def source(self) -> dict[str, object]:
        """What samples depend on apart from the sampling."""
        tokenizer = self.tokenizer.form() if self.tokenizer else None
        template = None if self.chat_template in ("", "none") else self.chat_template
        args = (self.tokenizer and self.tokenizer.template_args) or None
        return {"model_name": self.server.model_name, "chat_template": template, "template_args": args,
                "system_prompt": self.system_prompt or None, "tokenizer": tokenizer}

    def prompt(self, instruction: str, prefix: str = "", where: str = "") -> str | list[int]:
        """A problem as it is sent, perhaps with the beginning of its solution. Raises UserError, which begins with
        where the problem stands."""
        text = self.prompting.text(instruction)
        return encode_prompt(self.tokenizer, text, prefix, where=where) if self.tokenizer else text + prefix

    def shown(self, instruction: str) -> str:
        """A prompt for people."""
        prompt = self.prompt(instruction)
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, show_control=True)

    def complete(self, requests: Sequence[RemoteRequest], sampling: Sampling) -> Iterator[RemoteCompletion]:
        """The server's answers as they come; what is odd about all of them is said once."""
        for answer in complete(self.server, requests, sampling, concurrency=self.concurrency):
            prompt, reply = answer.request.prompt, answer.reply
            is_text = isinstance(prompt, str) and not self.server.chat  # a chat may well begin with the problem
            if reply and is_text and prompt.strip() and reply.text.startswith(prompt):
                self._warn_once("the server repeats the prompt before its answer; it is cut off there")
                answer = answer._replace(reply=reply._replace(text=reply.text[len(prompt) :], tokens=()))
            elif reply and reply.text and not reply.tokens:
                self._warn_once("the server gives no log-probs: samples have the logprob null")
            yield answer

    def sampler(self, sampling: Sampling) -> Sampler:
        """Whole solutions, as sample_prompts() takes them."""

        def sample(wanted: Sequence[SampleRequest]) -> Iterator[SamplerOutput]:
            """Yield samples as they come, with an error where the server gave none."""
            requests = [RemoteRequest(problem.id, n, self.prompt(problem.instruction, where=problem.where))
                        for problem, n in wanted]
            for (name, number, _), reply, error in self.complete(requests, sampling):
                if reply is None:
                    yield SamplerOutput(name, number, "", None, "", None, error)
                    continue
                text, stopped_by, reply = until(reply, sampling)
                logprob = None if reply.logprob is None else round(reply.logprob, 1)
                finish = "stop" if stopped_by else reply.finish
                yield SamplerOutput(name, number, text, reply.token_count, finish, logprob)

        return sample

    def _warn_once(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            runlog.logger().warning("%s", what)


def until(reply: Reply, sampling: Sampling) -> tuple[str, str, Reply]:
    """sampling.until_stop() of a reply, and the reply up to the end of that string. Some servers leave it in, or go on
    after it."""
    text, stop = sampling.until_stop(reply.text)
    return text, stop, reply.first(len(text) + len(stop))
