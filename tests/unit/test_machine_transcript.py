"""Logs that a guest writes to."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from sandbox_kernel.machine.transcript import Transcript


async def drain(reader_end: int) -> None:
    """Lets the event loop read what was written."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_the_disk_holds_the_first_part_and_memory_the_last(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    transcript = Transcript(reader, tmp_path / "log", limit=100)
    os.write(writer, b"first\n" + b"x" * 500 + b"\nlast words\n")
    await drain(reader)
    transcript.close()
    os.close(writer)
    kept = (tmp_path / "log").read_bytes()
    assert kept.startswith(b"first\n")
    assert kept.endswith(b"[the rest of this log was dropped]\n")
    assert len(kept) < 150
    assert transcript.last_lines(1) == "last words"


async def test_control_characters_of_a_guest_do_not_reach_an_error_message(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    transcript = Transcript(reader, tmp_path / "log")
    os.write(writer, b"\x1b[31mred\x07\r\n\x00\xff\n")
    await drain(reader)
    transcript.close()
    os.close(writer)
    assert transcript.last_lines() == "[31mred | \ufffd"


async def test_a_waiter_is_told_when_its_text_appears_in_pieces(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    transcript = Transcript(reader, tmp_path / "log")
    waiter = asyncio.ensure_future(transcript.seen("PROBE-OK"))
    os.write(writer, b"PROBE")
    await drain(reader)
    assert not waiter.done()
    os.write(writer, b"-OK\n")
    await asyncio.wait_for(waiter, 5)
    transcript.close()
    os.close(writer)
