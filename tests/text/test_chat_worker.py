"""src/text/chat_worker.py: what templates may use, as transformers renders it, and what they may not."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from src.text.chat_worker import MAX_CHARACTERS, render

MESSAGES = [{"role": "user", "content": " <a> & é "}, {"role": "assistant", "content": "b"}]
FEATURES = [
    "{% for m in messages %}\n    {% if loop.first %}\nfirst\n    {% endif %}\n{{ m.content }}\n{% endfor %}",
    "{%- for m in messages -%} {{ m['role'] | upper }}={{ m.content | trim }} {%- endfor -%}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].content.strip()) }}{{ f(bos_token) }}{{ f(pad_token) }}",
    "{{ messages[0].content.split('&')[-1] }}{{ tools is none }}{{ documents is defined }}{{ messages[::-1][0].role }}",
]


@pytest.mark.parametrize("source", FEATURES)
def test_features_render_as_in_transformers(source: str) -> None:
    expected = render_jinja_template([MESSAGES], chat_template=source, bos_token="<s>")[0][0]
    context = {"messages": MESSAGES, "bos_token": "<s>", "tools": None, "documents": None}
    assert render(source, context, {}) == {"text": expected}


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'].system('true') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ''['__cl' + 'ass__'].mro() }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_gives_nothing_away(source: str) -> None:
    reply = render(source, {"messages": [{"role": "user", "content": "x"}]}, {})
    assert "error" in reply or reply["text"] == "", reply


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("a\n{% if %}", "line 2: Expected an expression"),
        ("{{ nothing.there }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ strftime_now('%d') }}", "'strftime_now' is undefined"),  # prompts must not depend on the day
        ("{{ 'a' * 20000000 }}", f"the text has 20000000 characters; at most {MAX_CHARACTERS}"),
    ],
)
def test_a_failure_is_a_reply(source: str, message: str) -> None:
    assert message in render(source, {"messages": []}, {})["error"]
