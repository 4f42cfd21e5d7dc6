"""The process that renders chat templates; started by chat.py, never imported. The only door to jinja2.

A template comes with a checkpoint and cannot be trusted. It runs in jinja2's sandbox, in a process whose memory is
limited and which the kernel ends when one rendering uses too much time, even inside a C call.

A request {"template", "context", "args", "seconds"} has the reply {"text"} or {"error"}.
"""

import functools
import json
import resource
import signal
from datetime import datetime

import jinja2
from jinja2 import ext, meta, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from src.processes.worker import Answer, Reply, serve

MEMORY_LIMIT = 1024**3  # bytes of address space
MAX_CHARACTERS = 16 * 1024**2


class Generation(ext.Extension):
    """`{% generation %}`, with which some templates mark the assistant's words; here they render as they are."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> None:
    """A template's way to refuse a conversation."""
    raise jinja2.TemplateError(message)


@functools.cache
def compiled(source: str) -> tuple[jinja2.Template, set[str]]:
    """A template in the environment that Hugging Face's templates are written for, and the variables that it reads. Its
    strftime_now is left out on purpose: a prompt must not depend on the day. A day can be given for it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[ext.loopcontrols, Generation])
    environment.globals["raise_exception"] = raise_exception
    # json as models were trained on it: jinja2's own filter escapes for HTML
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    tree = environment.parse(source)
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    tested = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    reads = meta.find_undeclared_variables(tree) - environment.globals.keys() - (own - tested)
    return environment.from_string(source), reads


def render(source: str, context: dict[str, object], args: dict[str, object]) -> dict[str, str]:
    """The rendered text, or why there is none: a checkpoint's template may raise anything.

    args: values of the template's own variables; the day for strftime_now as YYYY-MM-DD.
    """
    try:
        template, reads = compiled(source)
        if unknown := sorted(args.keys() - (reads - context.keys())):
            expected = ", ".join(sorted(reads - context.keys())) or "none"
            return {"error": f"it takes no {unknown[0]!r} (--template_args); what can be given is: {expected}"}
        if "strftime_now" in args:
            args = args | {"strftime_now": datetime.fromisoformat(str(args["strftime_now"])).strftime}
        text = template.render(context | args)
        text.encode()  # a lone surrogate, which is no Unicode, is a ValueError
    except jinja2.TemplateSyntaxError as problem:
        return {"error": f"line {problem.lineno}: {problem.message}"}
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
            ValueError) as problem:
        said = str(problem) or type(problem).__name__
        fix = "; --template_args strftime_now=2024-07-26 says which day it is" if "'strftime_now' is" in said else ""
        return {"error": said + fix}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"the text has {len(text)} characters; at most {MAX_CHARACTERS} are read"}
    return {"text": text}


def answer(request: dict[str, object]) -> Reply:
    """Render under the limit of processor time: SIGPROF has its default action, which ends the process."""
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    reply = render(request["template"], request["context"], request["args"])
    signal.setitimer(signal.ITIMER_PROF, 0)
    return reply


def start() -> Answer:
    """Limit what the process can do."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return answer


if __name__ == "__main__":
    serve(start)
