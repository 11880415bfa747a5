"""The hh text format: turns that begin with "\\n\\nHuman:" or "\\n\\nAssistant:".

A prompt begins with "\\n\\nHuman:" and ends with "\\n\\nAssistant:"; a response is what follows, one leading space
included, trailing white space dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from morlaif_ray.data.rows import RowProblem

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"


def split_last_turn(dialogue: str, name: str) -> tuple[str, str]:
    """(prompt, response) of a whole dialogue; `name` is its key, for the message."""
    start = dialogue.find(HUMAN)
    if start == -1 and dialogue.startswith(HUMAN.lstrip()):
        dialogue, start = "\n\n" + dialogue, 0
    if start == -1 or dialogue[:start].strip():
        raise RowProblem(f"'{name}' must begin with a 'Human:' turn")
    cut = dialogue.rfind(ASSISTANT)
    if cut == -1:
        raise RowProblem(f"'{name}' has no 'Assistant:' turn")
    prompt = dialogue[start : cut + len(ASSISTANT)]
    response = dialogue[cut + len(ASSISTANT) :]
    if HUMAN in response:
        raise RowProblem(
            f"'{name}' ends with a 'Human:' turn; the last turn must be the Assistant's"
        )
    return prompt, as_response(response, name)


def as_response(text: str, name: str) -> str:
    """The text with exactly one leading space; RowProblem where nothing is left."""
    stripped = text.strip()
    if not stripped:
        raise RowProblem(f"the response in '{name}' is empty")
    return f" {stripped}"


def as_prompt(text: str) -> str:
    """A dialogue in hh format as it is; any other text becomes the one question of a Human."""
    if not text.strip():
        raise RowProblem("'prompt' is empty")
    if text.lstrip().startswith("Human:"):
        body = "\n\n" + text.strip()
        return body if body.endswith(ASSISTANT) else body + ASSISTANT
    return f"{HUMAN} {text.strip()}{ASSISTANT}"


def join_messages(messages: Sequence[tuple[str, str]]) -> str:
    """(role, content) messages as an hh prompt. System messages open the first Human turn: hh has no other place."""
    system = "\n\n".join(content for role, content in messages if role == "system")
    turns = [(role, content) for role, content in messages if role != "system"]
    if not turns or turns[0][0] != "user":
        raise RowProblem("the first message after 'system' must be the user's")
    if turns[-1][0] != "user":
        raise RowProblem("the prompt must end with a user message")
    if system:
        turns[0] = ("user", f"{system}\n\n{turns[0][1]}")
    marks = {"user": HUMAN, "assistant": ASSISTANT}
    return "".join(f"{marks[role]} {content.strip()}" for role, content in turns) + ASSISTANT


def drop_oldest_turns(prompt: str, max_chars: int) -> str:
    """The newest turns that fit, beginning with a Human turn; RowProblem where the last one alone is too long."""
    while len(prompt) > max_chars:
        following = prompt.find(HUMAN, len(HUMAN))
        if following == -1:
            raise RowProblem(
                f"the last Human turn alone makes a prompt of {len(prompt)} characters; "
                f"raise data.max_prompt_chars ({max_chars})"
            )
        prompt = prompt[following:]
    return prompt
