"""Rollouts at servers: the policy goes there as a PEFT adapter on disk, token ids and their log-probs come back."""

import secrets
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from src import jsonfile, load, parallel, runlog
from src.checkpoint import export, saving, sources, storage
from src.errors import UserError
from src.inference.engine import Completion, Request, Vocabulary, vocabulary_of
from src.inference.sampling import Sampling
from src.models.decoder import Decoder
from src.serving.server_client import RemoteCompletion, RemoteRequest, Reply, Server, api_key, call, complete
from src.text.tokenizer import Tokenizer
from src.training.ppo_config import PPOConfig

ROUNDS = 3  # in which what one server failed to answer is asked again, of all that are up


class PolicyServers:
    """Servers that speak vLLM's protocol and hold the base of the policy. Every rank makes one."""

    def __init__(self, config: PPOConfig, tokenizer: Tokenizer) -> None:
        self.config, self.vocabulary, key = config, vocabulary_of(tokenizer), api_key(config.api_key_env)
        self.context = load.load_config(config.actor_ckpt_dir).max_seq_len
        self.folder, self.run, self.name = Path(config.run_dir) / "policy", secrets.token_hex(4), ""
        if parallel.rank() == 0:
            storage.discard(self.folder)  # of a run that was stopped
        self.servers = [
            Server(base_url=url, model_name="", api_key=key, seconds=config.server_seconds,
                   stop_ids=self.vocabulary.eos_ids, token_ids=True) for url in config.base_url]
        # samples ahead on the first rank, while all ranks learn
        self.thread = ThreadPoolExecutor(1)
        self.ahead: tuple[list[Request], Future[list[Completion]]] | None = None  # on the first rank

    def hand_over(self, actor: Decoder, iteration: int) -> None:
        """Write the policy of an iteration as an adapter, for the next sample() to load, once what is sampled from the
        one before has come. All ranks call this."""
        name, config, written = f"policy-{self.run}-{iteration}", self.config, self.folder / "adapter"
        if name == self.name:
            return
        if config.rollout_ahead:
            # the servers still sample from the adapter that is about to go
            parallel.from_first_rank(lambda: bool(self.ahead and wait([self.ahead[1]])))
        saving.begin_save(actor, str(written), config.actor_ckpt_dir, lora=load.lora_config(config)).complete()
        if parallel.rank() == 0:
            export.export_peft(sources.open_adapter(written), self.folder / name, str(written))
            if self.name:
                storage.discard(self.folder / self.name)
        self.name = name
        parallel.barrier()

    def _load(self, server: Server) -> None:
        """Have a server hold the policy, and no earlier one of this run. Raises UserError."""
        listed = jsonfile.parse(call(server, "/models"), f"{server.base_url}/models").get("data")
        names = [model.get("id") for model in listed or () if isinstance(model, dict)]
        if self.name not in names:
            for old in names:
                # a server has places for few adapters
                if str(old).startswith(f"policy-{self.run}-"):
                    call(server, "/unload_lora_adapter", {"lora_name": old})
            path = str((self.folder / self.name).resolve())
            call(server, "/load_lora_adapter", {"lora_name": self.name, "lora_path": path})
        server.model_name = self.name

    def sample_ahead(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Begin what sample() will be asked for, from the policy handed over last. The first rank calls this."""
        self.ahead = list(requests), self.thread.submit(self._sample, requests, sampling)

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """A response to each request, in their order: what was begun, else from the policy handed over last.

        Raises UserError for a response that is not what was asked for, and where some are still missing after all
        rounds.
        """
        # a refill asks for others than those that were begun
        if self.ahead and self.ahead[0] == requests:
            (_, coming), self.ahead = self.ahead, None
            return coming.result()
        return self._sample(requests, sampling)

    def _sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """sample() without what was begun."""
        found: dict[tuple[str, int], Completion] = {}
        reason, asked = "", self.servers
        for _ in range(ROUNDS):
            missing = [request for request in requests if (request.id, request.sample) not in found]
            if not missing:
                break
            shares = [missing[place :: len(asked)] for place in range(len(asked))]
            with ThreadPoolExecutor(len(asked)) as threads:
                answers = list(threads.map(self._ask, asked, shares, [sampling] * len(shares)))
            well = []
            by_key = {(request.id, request.sample): request for request in missing}
            for server, (replies, problem) in zip(asked, answers, strict=True):
                for request, reply, error in replies:
                    key = request.id, request.sample
                    if reply is None:
                        problem = problem or f"{server.base_url}: {error}"
                        continue
                    try:
                        found[key] = read_response(by_key[key], reply, self.vocabulary, sampling, self.context)
                    except ValueError as lie:
                        raise UserError(f"{server.base_url} answers prompt {request.id!r} with {lie}; nothing was "
                                        "learnt from it: mend the server, and go on with --resume auto") from None
                reason = problem or reason
                if problem:
                    runlog.logger().warning("%s", problem)
                else:
                    well.append(server)
            asked = well or self.servers  # what one cannot answer another may
        if len(found) < len(requests):
            raise UserError(f"{len(requests) - len(found)} of {len(requests)} responses are missing, since {reason}; "
                            "go on with --resume auto once the server is up")
        return [found[request.id, request.sample] for request in requests]

    def _ask(
        self, server: Server, requests: Sequence[Request], sampling: Sampling
    ) -> tuple[list[RemoteCompletion], str]:
        """What a server answers, and why it does not go on."""
        replies: list[RemoteCompletion] = []
        try:
            self._load(server)
            remote = [RemoteRequest(request.id, request.sample, request.prompt) for request in requests]
            for reply in complete(server, remote, sampling, concurrency=self.config.rollout_batch_size):
                replies.append(reply)
        except UserError as problem:
            return replies, str(problem)
        return replies, ""


def read_response(
    request: Request, reply: Reply, vocabulary: Vocabulary, sampling: Sampling, context: int
) -> Completion:
    """A server's reply as one of our engine's. Raises ValueError, which says what was found, for a reply that our
    engine could not have given: no learning from it would be PPO."""
    ids, logprobs = list(reply.ids), [token.logprob for token in reply.tokens]
    if not ids:
        raise ValueError("no token ids (return_token_ids is vLLM's word for them)")
    if wrong := [each for each in ids if not 0 <= each < vocabulary.size]:
        raise ValueError(f"token id {wrong[0]}, expected ids below {vocabulary.size}")
    if len(logprobs) != len(ids) or reply.token_count not in (None, len(ids)):
        raise ValueError(f"{len(logprobs)} valid log-probs and a count of {reply.token_count} for {len(ids)} tokens")
    limit = min(sampling.max_new_tokens, context - len(request.prompt))
    text, stop = sampling.until_stop(vocabulary.decode(ids))
    _, early = sampling.until_stop(vocabulary.decode(ids[:-1]))
    if len(ids) > limit or any(each in vocabulary.eos_ids for each in ids[:-1]) or early:
        raise ValueError(f"{len(ids)} tokens that go on after their end; the limit is {limit}")
    finish = "stop" if ids[-1] in vocabulary.eos_ids or stop else "length"
    if reply.finish != finish or finish == "length" and len(ids) < limit:
        raise ValueError(f"finish_reason {reply.finish} after {len(ids)} of {limit} tokens, the last of which is "
                         f"{ids[-1]}; expected an end that the tokenizer's files or --task name")
    return Completion(request, ids, logprobs, logprobs, finish, text, [True] * len(ids))
