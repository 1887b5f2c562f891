"""METEOR's Java program, in a locale that is fixed, and for no longer than its work can take."""
from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from pycocoevalcap.meteor import meteor

# In other locales it writes 0,5, and cannot read what it wrote.
LOCALE = ["-Duser.language=en", "-Duser.country=US", "-Duser.language.format=en", "-Duser.country.format=US"]
START_SECONDS = 180   # to begin with it reads a large table; alone it takes 10
PAIR_SECONDS = 1e-4   # for a word of a caption beside a word of a reference; alone it takes a tenth


def meteor_score(references: Sequence[Sequence[Sequence[str]]], captions: Sequence[Sequence[str]]) -> float:
    """METEOR, 0 to 1, of a caption for each picture against all that people wrote of it, as words.

    Raises:
        OSError: Java failed, with what it said, or did not answer in time.
    """
    pairs = sum(len(words) * sum(map(len, each)) for words, each in zip(captions, references, strict=True))
    seconds = START_SECONDS + PAIR_SECONDS * pairs
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            ["java", *LOCALE, "-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=Path(meteor.__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            encoding="utf-8", start_new_session=True,  # whatever `java` starts in its turn can be ended with it
            env={**os.environ, "_JAVA_OPTIONS": " ".join([os.environ.get("_JAVA_OPTIONS", ""), *LOCALE])})  # wins
        watchdog = threading.Timer(seconds, end, [process])
        watchdog.start()
        try:
            return converse(process.stdin, process.stdout, references, captions)
        except (OSError, ValueError) as error:
            failure = error
        finally:
            in_time = watchdog.is_alive()
            watchdog.cancel()
            end(process)
            process.communicate()  # closes the pipes
        if not in_time:
            raise TimeoutError(f"no answer within {seconds:.0f} seconds") from failure
        said.seek(0)
        why = " ".join(line.strip() for line in said if not line.startswith("Picked up "))[:200]
        raise OSError(why or str(failure)) from failure


def converse(to_java: IO[str], from_java: IO[str], references: Sequence[Sequence[Sequence[str]]],
             captions: Sequence[Sequence[str]]) -> float:
    """Asks for the statistics of each caption, and then for the score of all."""
    statistics = []
    for words, each in zip(captions, references, strict=True):
        print("SCORE", *map(" ".join, each), " ".join(words).replace("|||", ""), sep=" ||| ", file=to_java, flush=True)
        statistics.append(from_java.readline().strip())
    print("EVAL", *statistics, sep=" ||| ", file=to_java, flush=True)
    return [float(from_java.readline()) for _ in (*captions, "all")][-1]


def end(process: subprocess.Popen[str]) -> None:
    with suppress(OSError):  # it has ended
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
