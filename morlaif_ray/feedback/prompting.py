"""From a question to the messages that a judge reads: template, few-shot examples, truncation.

    prompter_for(config.feedback) -> Prompter.messages(question)
    build_prompter(judge)         -> the same with the shipped template alone

Every process builds its own from the config.
"""

from __future__ import annotations

from collections.abc import Sequence

from morlaif_ray.artifacts import canonical_json
from morlaif_ray.config.judging import (
    FeedbackConfig,
    FewShotExample,
    JudgeConfig,
    LocalJudge,
    OpenAIBatchJudge,
    OpenAIJudge,
)
from morlaif_ray.errors import ConfigError
from morlaif_ray.feedback.client import AttemptError, Question
from morlaif_ray.feedback.fewshot import example_messages, load_few_shot
from morlaif_ray.feedback.local_weights import own_limit
from morlaif_ray.feedback.prices import CHARS_PER_TOKEN
from morlaif_ray.feedback.template import (
    DEFAULT_TEMPLATES,
    AnswerStyle,
    check_template,
    conversation_of,
    fill,
)
from morlaif_ray.feedback.truncation import CountTokens, Fitted, count_by_chars, fit, load_counter
from morlaif_ray.types import ResponsePair

PHRASE_TOKENS = 80
"""Kept free for the phrase, whatever its length, so that all principles see the pair cut in the same way."""


def style_of(judge: JudgeConfig) -> AnswerStyle:
    """How a single question to this judge is answered."""
    if not isinstance(judge, OpenAIJudge | OpenAIBatchJudge):
        return "letter"
    if judge.answer == "structured":
        return "json" if judge.reasoning is None else "reasoned_json"
    return "letter" if judge.reasoning is None else "reasoned"


class Prompter:
    """Messages for single and joint questions. `max_prompt_tokens` None: nothing is ever cut.

    ConfigError where the template is wrong, or template and examples alone fill the judge's context.
    """

    def __init__(
        self,
        template: str | None = None,
        *,
        style: AnswerStyle = "letter",
        examples: Sequence[FewShotExample] = (),
        system_prompt: str | None = None,
        max_prompt_tokens: int | None = None,
        count: CountTokens = count_by_chars,
    ) -> None:
        self.style: AnswerStyle = style
        self.template = template if template is not None else DEFAULT_TEMPLATES[style]
        check_template(self.template, style)
        self._joint_template = template if template is not None else DEFAULT_TEMPLATES["joint"]
        self._examples = tuple(examples)
        self._head = self._head_messages(self.template, style, system_prompt)
        self._joint_head = self._head_messages(self._joint_template, "joint", system_prompt)
        self._max_tokens = max_prompt_tokens
        self._count = count
        self._fixed = self._fixed_tokens(self._head, self.template)
        self._joint_fixed = self._fixed_tokens(self._joint_head, self._joint_template)
        if max_prompt_tokens is not None and self._room(self._fixed, "") <= 0:
            raise ConfigError(
                f"feedback.max_prompt_tokens is {max_prompt_tokens} but template and few-shot examples alone take "
                f"{self._fixed} of them and {PHRASE_TOKENS} are kept for the phrase; raise it or leave out examples"
            )

    @property
    def head_tokens(self) -> float:
        """Tokens of system prompt and examples, estimated as a budget does: rather too many than too few."""
        return sum(len(message["content"]) for message in self._head) / CHARS_PER_TOKEN

    def messages(self, question: Question) -> list[dict[str, str]]:
        """AttemptError("bad_request") for a pair whose last message alone is too long for the judge."""
        head = self._joint_head if question.members else self._head
        return [*head, {"role": "user", "content": self.user_message(question)}]

    def user_message(self, question: Question) -> str:
        """The last message alone, cut to the judge's context; AttemptError as in `messages`."""
        fitted = self._fit(question)
        if fitted is None:
            raise AttemptError(
                "bad_request",
                f"the last message alone is too long for feedback.max_prompt_tokens ({self._max_tokens})",
            )
        template = self._joint_template if question.members else self.template
        return fill(template, fitted.conversation, fitted.first, fitted.second, question.phrase)

    @property
    def max_prompt_tokens(self) -> int | None:
        return self._max_tokens

    def truncates(self, question: Question) -> bool:
        """Whether this question's pair is shown cut, or cannot be shown at all."""
        fitted = self._fit(question)
        return fitted is None or fitted.truncated

    def describe(self) -> str:
        """Everything here that can change an answer; the bare template where it is nothing else."""
        extras: dict[str, object] = {}
        if self._examples:
            extras["few_shot"] = [example.model_dump(mode="json") for example in self._examples]
        if self._max_tokens is not None:
            # The counter's identity is taken by what it says of the template: a path would not tell two files apart.
            extras["max_prompt_tokens"] = [self._max_tokens, self._fixed]
        return f"{self.template}\n{canonical_json(extras)}" if extras else self.template

    def _fit(self, question: Question) -> Fitted | None:
        conversation = conversation_of(question.prompt)
        first, second = question.first.strip(), question.second.strip()
        if self._max_tokens is None:
            return Fitted(conversation, first, second, False)
        fixed = self._joint_fixed if question.members else self._fixed
        room = self._room(fixed, question.phrase)
        # A token has at least one byte: most pairs are seen to fit without counting.
        if 4 * (len(conversation) + len(first) + len(second)) <= room:
            return Fitted(conversation, first, second, False)
        return fit(conversation, first, second, room, self._count)

    def _room(self, fixed: int, phrase: str) -> int:
        assert self._max_tokens is not None
        return self._max_tokens - fixed - max(PHRASE_TOKENS, self._count(phrase))

    def _head_messages(
        self, template: str, style: AnswerStyle, system_prompt: str | None
    ) -> list[dict[str, str]]:
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return system + example_messages(self._examples, template, style)

    def _fixed_tokens(self, head: list[dict[str, str]], template: str) -> int:
        texts = [message["content"] for message in head] + [fill(template, "", "", "", "")]
        return sum(self._count(text) for text in texts)


def build_prompter(judge: JudgeConfig, template: str | None = None) -> Prompter:
    system_prompt = (
        judge.system_prompt if isinstance(judge, OpenAIJudge | OpenAIBatchJudge) else None
    )
    return Prompter(template, style=style_of(judge), system_prompt=system_prompt)


def prompter_for(feedback: FeedbackConfig) -> Prompter:
    """Reads the few-shot and tokenizer files; ConfigError that says which is wrong."""
    judge = feedback.judge
    system_prompt = (
        judge.system_prompt if isinstance(judge, OpenAIJudge | OpenAIBatchJudge) else None
    )
    max_tokens, tokenizer = feedback.max_prompt_tokens, feedback.tokenizer
    if isinstance(judge, LocalJudge) and max_tokens is None:
        max_tokens, tokenizer = own_limit(judge)
    return Prompter(
        feedback.template,
        style=style_of(judge),
        examples=load_few_shot(feedback.few_shot),
        system_prompt=system_prompt,
        max_prompt_tokens=max_tokens,
        count=load_counter(tokenizer),
    )


def count_truncated(feedback: FeedbackConfig, pairs: Sequence[ResponsePair]) -> int:
    """Pairs that the judge sees cut, or not at all: `num_truncated` of summary.json."""
    prompter = prompter_for(feedback)
    if prompter.max_prompt_tokens is None:
        return 0
    return sum(
        prompter.truncates(
            Question(pair.prompt, pair.response_a, pair.response_b, "", "", "ab", b"")
        )
        for pair in pairs
    )
