"""One row of a source as an `Experience`: tokens of its prompt and of its responses.

Every rule here is record-local and public. A row that cannot be used (wrong type, empty, too long, two equal responses)
becomes a null record, which keeps its slot and contributes exactly zero.
"""

from __future__ import annotations

import hashlib
import os.path
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dprlhf_ray.config import DataConfig
from dprlhf_ray.data.columns import Kind
from dprlhf_ray.records import Completion, Experience, Prompt

_ASSISTANT = "\n\nAssistant:"  # before each response of a transcript in the style of hh-rlhf


class Format:
    """How rows of a data set become records of one kind of stage.

    Args:
        public_responses: texts that `rejected: public` takes as rejected ones.
    """

    def __init__(self, data: DataConfig, kind: Kind, tokenizer: Any, public_responses: Sequence[str] = ()) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._public_responses = public_responses
        self._read = {"rl": self._rl, "sft": self._demonstration, "reward_model": self._pair}[kind]

    def record(self, slot: int, row: Mapping[str, Any] | None) -> Experience:
        """The record of a row (our names of columns -> values; None: a row without them)."""
        try:
            found = None if row is None else self._read(slot, row)
        except Exception:  # whatever a record's content does to the template or tokenizer is that record's own failure
            found = None
        return null_record(slot) if found is None else found

    def _rl(self, slot: int, row: Mapping[str, Any]) -> Experience | None:
        if "messages" in row:
            opening: Any = row["messages"]
            if opening[-1]["role"] == "assistant":  # what the policy is to say itself
                opening = opening[:-1]
        else:
            opening = row["prompt"] if "prompt" in row else self._preferred(row)[0]
        prompt = self._prompt(slot, opening)
        return None if prompt is None else Experience(prompt, (), ())

    def _preferred(self, row: Mapping[str, Any]) -> tuple[Any, str]:
        """(prompt, preferred response) of a pair whose responses are whole conversations."""
        before, chosen = _response(row["chosen"])
        if before:
            return before, chosen
        opening, chosen, _ = _split(chosen, _response(row["rejected"])[1])
        return opening, chosen

    def _demonstration(self, slot: int, row: Mapping[str, Any]) -> Experience | None:
        if "text" in row:
            first, *rest = self._ids(row["text"], special=True)
            if rest[-1:] == [self._tokenizer.eos_token_id]:
                rest.pop()  # of a tokenizer that writes its own
            prompt: Prompt | None = Prompt(slot, (first,), self._tokenizer.decode([first], skip_special_tokens=True))
            completion = self._completion(rest, self._tokenizer.decode(rest), end=True)
        else:
            if "chosen" in row:
                before, response = self._preferred(row)
            else:
                before, response = _response(row["messages"] if "messages" in row else row["completion"])
            prompt = self._prompt(slot, row.get("prompt", before))
            completion = self._completion(self._ids(response), response, end=True)
        return None if prompt is None or completion is None else Experience(prompt, (completion,), (0.0,))

    def _pair(self, slot: int, row: Mapping[str, Any]) -> Experience | None:
        before, chosen = _response(row["chosen"])
        if "rejected" in row:
            before_rejected, rejected = _response(row["rejected"])
        else:
            before_rejected, rejected = before, chosen
        opening: Any = before
        if "prompt" in row:
            opening = row["prompt"]
        elif before != before_rejected:
            return None  # two prompts are no pair
        elif not before:
            opening, chosen, rejected = _split(chosen, rejected)
        bare = isinstance(opening, str) and not opening.strip()
        prompt = Prompt(slot, (), "") if bare else self._prompt(slot, opening)
        better = self._completion(self._ids(chosen), chosen)
        if prompt is None or better is None:
            return None
        if self._data.rejected == "truncated":
            third = better.token_ids[: max(1, len(better.token_ids) // 3)]
            worse: Completion | None = Completion(third, self._tokenizer.decode(third), False, None)
        else:
            if self._data.rejected == "public":
                rejected = self._public_responses[public_choice(slot, len(self._public_responses))]
            worse = self._completion(self._ids(rejected), rejected)
        if worse is None or worse.token_ids == better.token_ids:
            return None
        return Experience(prompt, (better, worse), (0.0, 0.0))

    def _prompt(self, slot: int, value: Any) -> Prompt | None:
        """Of a text, or of messages through the chat template; None when it is empty or too long."""
        data, tokenizer = self._data, self._tokenizer
        if isinstance(value, str) and not data.chat_template:
            text, special = value, True
        else:
            messages = _turns(value) if isinstance(value, str) else value
            empty = not any([_content(m).strip() for m in messages])
            text = "" if empty else tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            special = False  # a template writes its own
        token_ids = self._ids(text, special) if text.strip() else []
        if data.prompt_tokens is not None and len(token_ids) > data.prompt_tokens:
            token_ids = token_ids[: data.prompt_tokens]
            text = tokenizer.decode(token_ids, skip_special_tokens=True)
        if not 0 < len(token_ids) <= data.max_prompt_tokens:
            return None
        return Prompt(slot, tuple(token_ids), text)

    def _completion(self, token_ids: Sequence[int], text: str, end: bool = False) -> Completion | None:
        """At most `max_completion_tokens` tokens, an end-of-sequence token at the end included; None when empty."""
        if not token_ids or not text.strip():
            return None
        eos, most = self._tokenizer.eos_token_id, self._data.max_completion_tokens
        whole = (*token_ids, eos) if end and eos is not None else tuple(token_ids)
        if len(whole) <= most:
            return Completion(whole, text, True, None)
        return Completion(whole[:most], self._tokenizer.decode(whole[:most], skip_special_tokens=True), False, None)

    def _ids(self, text: Any, special: bool = False) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("a text is text")
        # verbose=False: otherwise the length of a long record is logged.
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def null_record(slot: int) -> Experience:
    """What stands for a row that cannot be used."""
    return Experience(Prompt(slot, (), ""), (), ())


def public_choice(slot: int, count: int) -> int:
    """Number of the public response for a slot, by the slot's SHA-256: it depends on nobody's data."""
    return int.from_bytes(hashlib.sha256(str(slot).encode()).digest()[:8], "big") % count


def _response(value: Any) -> tuple[list[Any], str]:
    """A response, and the messages before it: a text has none, of messages it is the last one of the assistant."""
    if isinstance(value, str):
        return [], value
    last = max(i for i, message in enumerate(value) if message["role"] == "assistant")
    return list(value[:last]), _content(value[last])


def _split(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and two responses of whole transcripts: all up to the last "Assistant:" that both share."""
    cut = os.path.commonprefix([chosen, rejected]).rfind(_ASSISTANT)
    start = 0 if cut < 0 else cut + len(_ASSISTANT)
    return chosen[:start], chosen[start:], rejected[start:]


def _turns(text: str) -> list[dict[str, str]]:
    """A text as messages: a transcript's turns, or what one user says."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if not text.endswith(_ASSISTANT) or parts[0] != "Human":
        return [{"role": "user", "content": text}]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[:-2:2], parts[1:-2:2], strict=True)  # the last one is for the policy to speak
    return [{"role": roles[who], "content": said.strip()} for who, said in turns]


def _content(message: Any) -> str:
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not isinstance(content, str):
        raise TypeError("a message has a role and a content, both text")
    return content
