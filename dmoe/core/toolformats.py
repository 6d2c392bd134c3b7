"""How models write calls of functions: one record per family, found by what its chat template says. Pure data.

A call is written ``head`` (with the function's name for :data:`NAME`), the arguments as JSON, ``tail``. Where ``head``
ends inside of a JSON object, the name stands in that object (an *envelope*), and a reader takes any order of its keys.

Sources: the chat templates of NousResearch/Hermes-2-Pro and Qwen/Qwen2.5 (Hermes), meta-llama/Llama-3.1 (Llama 3,
"JSON based tool calling" of its model card), mistralai/Mistral-7B-Instruct-v0.3 and Mistral-Small-3.2, deepseek-ai/
DeepSeek-V3 and V3.1, openai/gpt-oss (its "harmony response format").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

NAME: Final = "\x00"
"""Stands for the function's name in ``head``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How one family writes calls."""

    title: str
    signs: tuple[str, ...]
    """Texts that all stand in the chat template."""
    head: str
    tail: str
    opening: str = ""
    """Before the first call."""
    closing: str = ""
    """Behind the last."""
    separator: str = ""
    begins: tuple[str, ...] = ()
    """What tells a reader that a call (or a list of them) begins; by default the head up to the name or the object."""
    between: tuple[str, ...] = ()
    """What a reader skips between calls and behind the last."""
    bare: bool = False
    """An answer that begins with an object is a call, if the object names one of the functions."""
    alone: bool = False
    """One call per answer."""
    channels: bool = False
    """Messages with headers, which also mark what is thought and what is said (harmony)."""
    short_ids: bool = False
    """Calls have ids of nine letters and digits."""

    @property
    def marks(self) -> tuple[str, ...]:
        """What a reader looks for: ``begins``, or the head up to the name or the object."""
        return self.begins or (self.head.partition(NAME)[0].partition("{")[0].rstrip(),)

    @property
    def name_end(self) -> str:
        """What stands between name and arguments; empty where both are in an envelope."""
        before, _, after = self.head.partition(NAME)
        return "" if "{" in before else after


HERMES: Final = ToolFormat(
    title="Hermes",
    signs=("<tool_call>",),
    head=f'<tool_call>\n{{"name": "{NAME}", "arguments": ',
    tail="}\n</tool_call>",
    separator="\n",
    between=("</tool_call>",),
)
LLAMA: Final = ToolFormat(
    title="Llama 3",
    signs=("<|python_tag|>", '"parameters"'),
    head=f'{{"name": "{NAME}", "parameters": ',
    tail="}",
    separator="; ",
    begins=("<|python_tag|>",),
    between=(";", "<|python_tag|>"),
    bare=True,
)
MISTRAL: Final = ToolFormat(
    title="Mistral",
    signs=("[TOOL_CALLS]",),
    opening="[TOOL_CALLS] [",
    head=f'{{"name": "{NAME}", "arguments": ',
    tail="}",
    separator=", ",
    closing="]",
    begins=("[TOOL_CALLS]",),
    between=(",", "]", "["),
    short_ids=True,
)
MISTRAL_ARGS: Final = ToolFormat(
    title="Mistral (2025)",
    signs=("[TOOL_CALLS]", "[ARGS]"),
    head=f"[TOOL_CALLS]{NAME}[ARGS]",
    tail="",
    short_ids=True,
)
DEEPSEEK: Final = ToolFormat(
    title="DeepSeek V3",
    signs=("<｜tool▁call▁begin｜>", "```json"),  # noqa: RUF001 - the model's own spelling
    opening="<｜tool▁calls▁begin｜>",  # noqa: RUF001
    head=f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{NAME}\n```json\n",  # noqa: RUF001
    tail="\n```<｜tool▁call▁end｜>",  # noqa: RUF001
    separator="\n",
    closing="<｜tool▁calls▁end｜>",  # noqa: RUF001
    begins=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"),  # noqa: RUF001
    between=("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁calls▁begin｜>"),  # noqa: RUF001
)
DEEPSEEK_31: Final = ToolFormat(
    title="DeepSeek V3.1",
    signs=("<｜tool▁call▁begin｜>",),  # noqa: RUF001
    opening="<｜tool▁calls▁begin｜>",  # noqa: RUF001
    head=f"<｜tool▁call▁begin｜>{NAME}<｜tool▁sep｜>",  # noqa: RUF001
    tail="<｜tool▁call▁end｜>",  # noqa: RUF001
    closing="<｜tool▁calls▁end｜>",  # noqa: RUF001
    begins=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),  # noqa: RUF001
    between=("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁calls▁begin｜>"),  # noqa: RUF001
)
HARMONY: Final = ToolFormat(
    title="harmony",
    signs=("<|channel|>", "<|message|>"),
    head=f"<|channel|>commentary to=functions.{NAME} <|constrain|>json<|message|>",
    tail="",
    alone=True,
    channels=True,
)
FORMATS: Final[Sequence[ToolFormat]] = (HARMONY, DEEPSEEK, DEEPSEEK_31, MISTRAL_ARGS, MISTRAL, HERMES, LLAMA)
"""More signs first: what fits two is the former."""

_OTHERS: Final = ("<arg_key>", "<function=", "<tool_call>{{ tool_call.name", "<|tool_calls_section_begin|>")
"""Signs of forms that nobody here reads, beside signs that somebody does."""

HARMONY_MARKS: Final = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")


def find_format(template: str) -> ToolFormat | None:
    """The format of a chat template; None if it has none that is known here."""
    if any(sign in template for sign in _OTHERS):
        return None
    return next((each for each in FORMATS if all(sign in template for sign in each.signs)), None)
