"""What a check has to say: one sentence, and how much it matters."""

from dataclasses import dataclass

OK, ADVICE, WARNING, ERROR, SKIPPED = "ok", "advice", "warning", "error", "skipped"


@dataclass(frozen=True)
class Finding:
    """`name` is the check's; a message says what to write instead."""

    name: str
    status: str
    message: str = ""


# a check yields a status and a sentence; nothing means that all is well
Remark = tuple[str, str]
