"""``popmm chat``: questions about text and pictures in a terminal, pruned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console

from popmm.cli.images import open_image
from popmm.config import PopConfig
from popmm.conversation import Answer, Conversation, speed
from popmm.evaluation.progress import for_people
from popmm.report import human_bytes
from popmm.zoo.encoding import check_chats

HELP = """/image PATH   show a picture (file or address) with the next question
/bytes 0.25   read so much of the FFNs from now on (tiers); 1 = dense
/ratio 0.3    prune so much from now on (without --selection by gate); 0 = dense
/stats        what the last answer cost, and the partition
/reset        forget what was said and shown
/quit         leave"""


def lines_from_terminal() -> Iterator[str]:
    """Lines that people type, until the end of the input; piped input works too."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return


class Chat:
    """Runs commands and questions, one line each; bad input is answered in one line and the chat goes on."""

    def __init__(self, conversation: Conversation, console: Console, config: PopConfig) -> None:
        self.conversation, self.console = conversation, console
        self.settings = config  # what /ratio changes
        self.last: Answer | None = None
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.image,
            "/bytes": self.bytes,
            "/ratio": self.ratio,
            "/stats": self.stats,
            "/reset": self.reset,
            "/help": self.help,
        }

    def run(self, lines: Iterable[str]) -> None:
        """Takes lines until ``/quit`` or their end."""
        for line in lines:
            if line.split()[:1] == ["/quit"]:
                return
            if line.strip():
                self.take(line.strip())

    def take(self, line: str) -> None:
        """One command or question."""
        try:
            if not line.startswith("/"):
                self.last = self.conversation.ask(line, stream=True)
                if not self.last.text:
                    self.console.print("[the model ended at once: ask in other words]", style="yellow", markup=False)
                return
            name, _, argument = line.partition(" ")
            if name not in self.commands:
                raise ValueError(f"there is no command {name}: {', '.join(self.commands)}, /quit")
            self.commands[name](argument.strip())
        except KeyboardInterrupt:
            self.console.print("\n[interrupted; the question is taken back]", style="dim", markup=False)
        except Exception as error:  # a chat survives what a model or file does
            text = str(error).splitlines()[0] if str(error) else repr(error)
            if not line.startswith("/") and self.conversation.drop_pictures():
                text += " (the new picture is dropped)"
            self.console.print(text, style="red", markup=False, soft_wrap=True)

    def image(self, source: str) -> None:
        if not source:
            raise ValueError("/image PATH: name a file or an http(s) address")
        source = source.strip("'\"")  # as terminals paste paths
        picture, note = open_image(source)
        self.conversation.show(picture)
        size = f"{picture.width} x {picture.height} pixels"
        self.console.print(f"{note or source}: {size}; ask about it", style="dim", markup=False)

    def ratio(self, value: str) -> None:
        try:
            ratio = float(value)
        except ValueError:
            raise ValueError(f"/ratio {value}: give a number in [0, 1), such as 0.3") from None
        self._change(f"pruning_ratio {ratio:g}", pruning_ratio=ratio)

    def bytes(self, value: str) -> None:
        try:
            share = float(value)
        except ValueError:
            raise ValueError(f"/bytes {value}: give a share in (0, 1], such as 0.25") from None
        self._change(f"bytes {share:g}", bytes=share, selection="tiers")

    def _change(self, what: str, **changes) -> None:
        settings = self.settings.replace(**changes)
        self.conversation.config = settings
        self.settings, self.last = settings, None
        read, dense = self.conversation.state.bytes_per_token()
        self.console.print(
            f"{what}, {settings.selection}: reads {human_bytes(read)} of {human_bytes(dense)} FFN weights per token "
            f"({read / dense:.1%}), skips {self.conversation.state.channels_skipped():.1%} of the FFN channels",
            style="dim",
            markup=False,
            soft_wrap=True,
        )

    def stats(self, _: str) -> None:
        if self.last is not None:
            whole = "the whole conversation" if self.last.read_again else "the new question, on the kept cache"
            self.console.print(f"last answer: {speed(self.last)}; read {whole}", markup=False)
        if self.conversation.state is not None:
            self.console.print(self.conversation.state.summary(), markup=False, soft_wrap=True)

    def reset(self, _: str) -> None:
        self.conversation.reset()
        self.last = None
        self.console.print("forgotten what was said and shown", style="dim")

    def help(self, _: str) -> None:
        self.console.print(HELP, markup=False)


def chat(model, processor, config: PopConfig, sources: list[str], **generation) -> None:
    """Chats in this terminal until ``/quit``, then detaches the model.

    Args:
        sources: files or addresses of pictures that come with the first question.
    """
    check_chats(processor)
    console = for_people()
    conversation = Conversation(model, processor, config, **generation)
    try:
        room = Chat(conversation, console, config)
        for source in sources:
            room.take(f"/image {source}")
        if sys.stdin.isatty():
            console.print(HELP, style="dim", markup=False)
        room.run(lines_from_terminal())
    finally:
        conversation.close()
