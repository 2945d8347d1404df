"""Texts that people write: prompts, a line each, and the captions beside images."""

from pathlib import Path

_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file: UTF-8 with or without a byte-order mark, one on each line that isn't blank.

    Lines end with a line feed, or a carriage return and a line feed, and nowhere else: a form feed, a next line
    (U+0085) or a line separator (U+2028) belongs to its prompt. White space around a prompt is left out.

    Raises:
        ValueError: no such file, or not such text; says in which line.
    """
    if not path.is_file():
        raise ValueError(f"prompts: got {str(path)!r}, expected a text file with a prompt per line")
    content = path.read_bytes()
    try:
        text = decoded(content)
    except ValueError as error:
        raise ValueError(f"prompts: {str(path)!r} {error}") from None
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        prompt = line.removesuffix("\r").strip()
        if "\r" in prompt:
            raise ValueError(
                f"prompts: {str(path)!r} has a carriage return inside of line {number}, expected lines that end with a"
                " line feed (or both)"
            )
        if prompt:
            prompts.append(prompt)
    return prompts


def decoded(content: bytes) -> str:
    """UTF-8 text, without its byte-order mark.

    Raises:
        ValueError: it isn't; says in which line, to be put behind the name of the file.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"isn't UTF-8 text: byte 0x{content[error.start]:02x} in line {line}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"isn't UTF-8 text: a zero byte in line {line}, as UTF-16 has them")
    return text.removeprefix(_MARK)
