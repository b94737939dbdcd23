"""Chat templates of strangers, rendered in a process that has limits: a template is a program, and may never end.

The sandbox of converters.chat keeps a template from Python's objects. It does not keep it from looping, or from making
a text of gigabytes. One line of JSON goes to the child for each conversation, one comes back.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import psutil

from converters.chat import render, template_variables
from converters.errors import ModelError
from converters.tokenizer import Tokenizer
from tundish.child import without_signing_key

SECONDS = 2  # of a processor, for one conversation; sound templates take milliseconds
MEMORY = 1 << 29  # bytes, on top of what the process has when it begins
CHARACTERS = 1 << 20  # of a prompt, on top of sixteen times the conversation's

_MEND = "The template comes with the model: see whether a newer revision of it has another one."

Render = Callable[[Sequence[Mapping[str, object]], bool], str]
"""Messages with "role" and "content", and whether the prompt for an answer follows -> the prompt."""


@contextmanager
def chat_renderer(tokenizer: Tokenizer) -> Iterator[Render]:
    """What converters.chat.render_chat does, within SECONDS and MEMORY; ModelError says if a template passes them."""
    template, variables = template_variables(tokenizer)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "tundish.chat_renderer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env=without_signing_key(),
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            _ask(process, [template, variables, SECONDS, MEMORY])
            yield lambda messages, prompt: _answer(_ask(process, [messages, prompt]))
        finally:
            process.kill()
            with suppress(OSError):  # what a child that died has not read, and Popen would write once more
                process.stdin.close()


def _ask(process: subprocess.Popen[str], question: object) -> object:
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(SECONDS * 10, process.kill)  # the child has its own limit, where the system has such timers
    timer.start()
    try:
        process.stdin.write(json.dumps(question, default=str) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        timer.cancel()
    if not line:
        raise ModelError(
            "the chat template takes too long or too much memory",
            where="chat_template",
            expected=f"a prompt within {SECONDS} s and {MEMORY >> 20} MiB",
            mend=_MEND,
        )
    return json.loads(line)


def _answer(answer: object) -> str:
    if isinstance(answer, str):
        return answer
    assert isinstance(answer, dict)
    what = str(answer.pop("what"))
    raise ModelError(what, **answer)


def _serve() -> None:
    """For the child: the first line says what to render by, and within what."""
    template, variables, seconds, memory = json.loads(sys.stdin.readline())
    limit_memory(memory)
    print("0", flush=True)
    for line in sys.stdin:
        messages, prompt = json.loads(line)
        limit_time(seconds)
        try:
            answer: object = _bounded(render(template, variables, messages, prompt), CHARACTERS + 16 * len(line))
        except ModelError as error:
            answer = {name: getattr(error, name) for name in ("what", "where", "expected", "found", "mend")}
        limit_time(0)
        print(json.dumps(answer), flush=True)


def limit_time(seconds: float) -> None:
    """End this process after so many seconds of a processor, where the system has such timers; 0 is no limit."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles its signal


def limit_memory(nbytes: int) -> None:
    """Let this process take at most so many bytes more, where the system has such limits."""
    if sys.platform != "win32":
        import resource

        most = psutil.Process().memory_info().vms + nbytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _bounded(prompt: str, most: int) -> str:
    if len(prompt) > most:
        raise ModelError(
            "the chat template makes too much of a conversation",
            where="chat_template",
            expected=f"at most {most:,} characters",
            found=f"{len(prompt):,}",
            mend=_MEND,
        )
    return prompt


if __name__ == "__main__":
    _serve()
