"""The `local` judge: a causal LM in this process answers A or B from its next-token distribution, nothing is sampled.

    ask_many(questions) -> chat template or plain text -> token ids -> PrefixScorer -> {"A": ..., "B": ..., others}

Questions about one pair in one order share their prompt up to the phrase: `PrefixScorer` computes that part once. An
answer does not depend on which questions it is asked with (float32: below 1e-4 nats).

Every token of the vocabulary that spells the bare letter counts (`parsing.letter_of`), and the probabilities are those
of the full softmax, so the A/B mass is exact. A pair that is too long for the model loses its oldest turns first, then
the ends of both responses. The prompter does that where it knows the limit (`local_weights.own_limit`), so that the
driver can count the pairs; what is still too long, by the exact count of the whole, is cut here in the same way.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from morlaif_ray.backbone import load_causal_lm, load_tokenizer
from morlaif_ray.config.judging import LocalJudge
from morlaif_ray.errors import ConfigError, FeedbackError
from morlaif_ray.feedback.client import AttemptError, Question, RawAnswer
from morlaif_ray.feedback.local_scoring import PrefixScorer
from morlaif_ray.feedback.local_weights import model_version
from morlaif_ray.feedback.parsing import letter_of
from morlaif_ray.feedback.prompting import PHRASE_TOKENS, Prompter
from morlaif_ray.feedback.template import conversation_of
from morlaif_ray.feedback.truncation import fit
from morlaif_ray.feedback.vllm_scoring import VllmScorer, vllm_is_installed

ANSWER_CUE = "\n\nAnswer:"
"""Ends the prompt of a model without a chat template, so that a letter is what comes next."""
SHOWN_TOKENS = 4
"""Likeliest tokens that are looked through for the ledger's record of what else the judge would have said."""
SLACK_TOKENS = 8
"""Token counts of parts may fall short of the count of the whole by a few."""


class LocalClient:
    """Loads the model at once. ArtifactError, FeedbackError or ConfigError where it cannot judge."""

    def __init__(self, judge: LocalJudge, prompter: Prompter) -> None:
        self.version = model_version(judge)
        path = (
            str(Path(judge.model).expanduser())
            if Path(judge.model).expanduser().is_dir()
            else judge.model
        )
        self._tokenizer = load_tokenizer(path, judge.revision)
        self._prompter = prompter
        self._a_ids, self._b_ids = _letter_ids(self._tokenizer, judge.model)
        self._vllm: VllmScorer | None = None
        if judge.engine == "vllm" or (judge.engine == "auto" and vllm_is_installed()):
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(path, revision=judge.revision)
            text = config.get_text_config()
            context = _context(judge, config, text.vocab_size, len(self._tokenizer))
            # vLLM samples one token that nobody reads; it must fit too.
            own = getattr(text, "max_position_embeddings", None) or context + 1
            self._max_length = min(context, own - 1)
            self._vllm = VllmScorer(judge, path, self._max_length)
        elif judge.slices > 1:
            raise ConfigError(
                f"feedback.judge: only vLLM slices a model over {judge.slices} processes, and it is not installed "
                f"here; install the extra 'vllm', or write gpus_per_worker: 1"
            )
        else:
            model = load_causal_lm(path, dtype=judge.dtype, revision=judge.revision)
            rows = model.get_input_embeddings().num_embeddings
            self._max_length = _context(judge, model.config, rows, len(self._tokenizer))
            device = "cuda" if judge.gpus_per_worker > 0 else "cpu"
            self._scorer = PrefixScorer(
                model.eval().to(device),
                pad_id=int(self._tokenizer.pad_token_id),
                max_rows=judge.batch_size,
            )
        self._batch_size = judge.batch_size
        # One call at a time: two at once would share the cores and double the memory.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="local-judge")
        self.num_truncated = 0

    @property
    def questions_per_call(self) -> int:
        """Questions that one `ask_many` does well with; more only delay the first answers."""
        return self._batch_size

    async def ask(self, question: Question) -> RawAnswer:
        answer = (await self.ask_many([question]))[0]
        if isinstance(answer, AttemptError):
            raise answer
        return answer

    async def ask_many(self, questions: Sequence[Question]) -> list[RawAnswer | AttemptError]:
        """One entry per question, in order; AttemptError for those that could not be asked. FeedbackError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._answer, list(questions))

    def when_lost(self, act: Callable[[], None]) -> None:
        if self._vllm is not None:
            self._vllm.when_lost(act)

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._vllm is not None:
            self._vllm.close()

    def _answer(self, questions: list[Question]) -> list[RawAnswer | AttemptError]:
        encoded = self._encode_all(questions)
        groups: dict[tuple[str, str, str], list[int]] = {}
        for number, (question, ids) in enumerate(zip(questions, encoded, strict=True)):
            if not isinstance(ids, AttemptError):
                shown = (question.prompt, question.first, question.second)
                groups.setdefault(shown, []).append(number)
        prompts = [[encoded[number] for number in group] for group in groups.values()]
        try:
            tops = (
                self._scorer.score(prompts, self._read)
                if self._vllm is None
                else self._read_tokens(self._vllm.score(prompts, self._a_ids + self._b_ids))
            )
        except torch.OutOfMemoryError:
            raise FeedbackError(
                f"the local judge ran out of memory with batch_size {self._batch_size}; reduce "
                f"feedback.judge.batch_size or max_length, or give its workers a larger GPU"
            ) from None
        answers: list[Any] = list(encoded)
        order = [number for group in groups.values() for number in group]
        for number, top in zip(order, tops, strict=True):
            answers[number] = RawAnswer(top, self.version, len(encoded[number]), 0)
        return answers

    def _read(self, logprobs_RV: torch.Tensor) -> list[dict[str, float]]:
        """Both letters over all their spellings, and the likeliest other tokens for the record."""
        sums_R2 = torch.stack(
            [logprobs_RV[:, ids].logsumexp(dim=1) for ids in (self._a_ids, self._b_ids)], dim=1
        )
        top = logprobs_RV.topk(min(SHOWN_TOKENS, logprobs_RV.shape[1]), dim=1)
        found = []
        for (a, b), values, ids in zip(
            sums_R2.tolist(), top.values.tolist(), top.indices.tolist(), strict=True
        ):
            tokens = self._tokenizer.convert_ids_to_tokens(ids)
            others = {
                token: value
                for token, value in zip(tokens, values, strict=True)
                if token is not None and not letter_of(token)
            }
            found.append({"A": a, "B": b, **others})
        return found

    def _read_tokens(self, found: list[dict[int, float]]) -> list[dict[str, float]]:
        """The same from single tokens' log-probabilities; of the others only the likeliest is known."""
        letters = {*self._a_ids, *self._b_ids}
        tops = []
        for logprobs in found:
            a, b = (
                torch.tensor([logprobs[token] for token in ids]).logsumexp(dim=0).item()
                for ids in (self._a_ids, self._b_ids)
            )
            others = {
                str(self._tokenizer.convert_ids_to_tokens(token)): value
                for token, value in logprobs.items()
                if token not in letters
            }
            tops.append({"A": a, "B": b, **others})
        return tops

    def _encode_all(self, questions: list[Question]) -> list[Any]:
        """Token ids of every prompt, or the AttemptError of those that cannot be shown."""
        texts = [self._text(question) for question in questions]
        whole = [text for text in texts if isinstance(text, str)]
        ids = iter(self._tokenize(whole))
        phrases = dict.fromkeys(question.phrase for question in questions)
        lengths = dict(zip(phrases, map(len, self._tokenize(list(phrases))), strict=True))
        encoded: list[Any] = []
        for question, text in zip(questions, texts, strict=True):
            if isinstance(text, AttemptError):
                encoded.append(text)
                continue
            prompt = next(ids)
            # Every phrase counts alike, so that all principles see the pair cut in the same way.
            spare = max(0, PHRASE_TOKENS - lengths[question.phrase])
            fits = len(prompt) + spare <= self._max_length
            encoded.append(prompt if fits else self._encode_cut(question, len(prompt) + spare))
        return encoded

    def _encode_cut(self, question: Question, length: int) -> list[int] | AttemptError:
        """The prompt of a pair that is too long: `length` tokens with the phrase at its full allowance."""
        self.num_truncated += 1
        shown = [conversation_of(question.prompt), question.first.strip(), question.second.strip()]
        fixed = length - sum(map(self.count_tokens, shown))
        fitted = fit(
            shown[0], shown[1], shown[2], self._max_length - fixed - SLACK_TOKENS, self.count_tokens
        )
        if fitted is not None:
            text = self._text(
                dataclasses.replace(
                    question,
                    prompt=fitted.conversation,
                    first=fitted.first,
                    second=fitted.second,
                )
            )
            ids = self._tokenize([text])[0] if isinstance(text, str) else []
            if ids and len(ids) <= self._max_length:
                return ids
        return AttemptError(
            "bad_request",
            f"the last message alone is too long for the local judge ({self._max_length} tokens)",
        )

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # A chat template writes its own special tokens.
        special = self._tokenizer.chat_template is None
        encoded = self._tokenizer(texts, add_special_tokens=special, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _text(self, question: Question) -> str | AttemptError:
        try:
            messages = self._prompter.messages(question)
        except AttemptError as error:
            return error
        if self._tokenizer.chat_template is None:
            return "\n\n".join(
                message["content"]
                if message["role"] != "assistant"
                else f"{ANSWER_CUE.strip()} {message['content']}"
                for message in messages
            ) + (ANSWER_CUE)
        from jinja2 import TemplateError

        try:
            # Models that can think aloud are told not to: the next token is the answer.
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except TemplateError as error:
            raise FeedbackError(
                f"the chat template of {self.version} refuses the judge's messages ({error}); "
                f"leave out feedback.few_shot, or use another model"
            ) from None
        return text


def _context(judge: LocalJudge, config: Any, rows: int, vocabulary: int) -> int:
    """Longest prompt in tokens; `rows` of the embedding. ConfigError where tokenizer, model and `max_length` clash."""
    if vocabulary > rows:
        raise ConfigError(
            f"feedback.judge.model {judge.model}: its tokenizer has {vocabulary} tokens, the model {rows}; "
            f"save the tokenizer that the model was trained with beside it"
        )
    # Not every configuration states a limit (state-space models have none).
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if own is None:
        return judge.max_length or 1 << 20
    if judge.max_length is not None and judge.max_length > own:
        raise ConfigError(
            f"feedback.judge.max_length is {judge.max_length}, but {judge.model} reads at most {own} tokens; "
            f"write {own} or less, or leave it out"
        )
    return judge.max_length or int(own)


def _letter_ids(tokenizer: Any, name: str) -> tuple[list[int], list[int]]:
    """The ids of all spellings of A and of B. FeedbackError where the vocabulary lacks one of the letters."""
    spelt: dict[str, list[int]] = {"A": [], "B": [], "": []}
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if token is not None:
            spelt[letter_of(token)].append(index)
    for letter in ("A", "B"):
        if not spelt[letter]:
            raise FeedbackError(
                f"feedback.judge.model {name}: its vocabulary has no token for the letter {letter}, so it cannot "
                f"answer; use a model with a general tokenizer"
            )
    return spelt["A"], spelt["B"]
