"""Ranks know of each other who is there, who is silent and who has ended; a log says what one of them printed."""

import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from lab import forked

from core.contracts.errors import UserError
from core.training import heartbeats, rank_watch
from core.training.heartbeats import DONE, FAILED, FOLLOWS, GONE, Heartbeats
from core.training.launchers import Launch
from core.training.machine import code_version
from core.training.rank_logs import log_hint, log_of, open_log, redirect_output
from core.training.rank_watch import RankWatch


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """The time in seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the heartbeats."""
    made = Clock()
    monkeypatch.setattr(heartbeats, "time", made)
    return made


class Store:
    """A key-value store as torch's, in this process."""

    def __init__(self) -> None:
        self.lines: dict[str, bytes] = {}
        self.has_gone = False

    def set(self, key: str, line: str) -> None:
        """Writes a line."""
        if self.has_gone:
            raise dist.DistNetworkError("Connection reset by peer")
        self.lines[key] = line.encode()

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return all(key in self.lines for key in keys)

    def get(self, key: str) -> bytes:
        """The line of a key, which is there."""
        return self.lines[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """The lines of some keys, which are there."""
        return [self.lines[key] for key in keys]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store that heartbeats find."""
    made = Store()
    monkeypatch.setattr(heartbeats, "_store_at", lambda address, port: made)
    return made


@pytest.fixture
def three(clock: Clock, store: Store) -> list[Heartbeats]:
    """The heartbeats of three tasks of srun on three nodes."""
    launches = [Launch(rank, 3, "srun", nodes=3, node=rank) for rank in range(3)]
    return [Heartbeats(launch, "127.0.0.1", 29500) for launch in launches]


def beat(clock: Clock, *ranks: Heartbeats) -> None:
    """A second passes, and some ranks give a sign; the first one reads them."""
    clock.now += 1.0
    for rank in reversed(ranks):
        rank.beat()


def test_the_first_rank_knows_who_is_missing_and_who_is_silent(
    clock: Clock, three: list[Heartbeats]
) -> None:
    first, second, third = three
    beat(clock, first)
    assert first.missing() == [1, 2]
    for _ in range(3):
        beat(clock, *three)
    assert first.missing() == []
    assert first.silent(1.0) is None
    for _ in range(4):
        beat(clock, first, third)
    assert first.silent(4.0) == 1
    assert first.silent(5.0) is None
    assert first.signs[1].process == str(os.getpid())
    beat(clock, first, second, third)
    assert first.silent(1.0) is None


def test_a_rank_that_has_never_given_a_sign_gets_twice_the_time(
    clock: Clock, three: list[Heartbeats], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    first, second, _ = three
    for _ in range(6):
        beat(clock, first, second)
    assert first.silent(4.0) is None
    assert first.silent(3.0) == 2


def test_a_rank_that_has_ended_is_not_waited_for(clock: Clock, three: list[Heartbeats]) -> None:
    first, second, third = three
    beat(clock, *three)
    second.end(DONE)
    third.end(FOLLOWS)
    for _ in range(9):
        beat(clock, first)
    assert first.silent(1.0) is None
    assert first.failed() is None
    third.end(FAILED)
    beat(clock, first)
    assert first.failed() == 2


@pytest.fixture
def four(clock: Clock, store: Store) -> list[Heartbeats]:
    """The heartbeats of four tasks of srun on two nodes, which have given signs."""
    made = []
    for rank in range(4):
        launch = Launch(rank, 4, "srun", nodes=2, node=rank // 2, local_rank=rank % 2)
        made.append(Heartbeats(launch, "127.0.0.1", 29500))
    for _ in range(2):
        beat(clock, *made)
    return made


def test_a_process_that_vanishes_is_named_by_another_rank_of_its_node(
    clock: Clock, four: list[Heartbeats], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks 2 and 3 are on the second node; rank 3 cannot be seen by rank 0."""
    assert [sorted(beats.signs) for beats in four] == [[1, 2, 3], [0], [0, 3], [0, 2]]
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        ended = str(process.pid)
    assert not heartbeats.is_running(ended)
    monkeypatch.setattr(heartbeats, "is_running", lambda process: False)
    beat(clock, four[0], four[2])
    assert four[0].gone() == 1
    assert four[0].signs[3].state == four[2].signs[3].state == GONE
    assert four[1].gone() is None
    beat(clock, four[1])
    assert four[1].gone() == 0, "the last rank of a node looks after the first"


def test_a_rank_that_has_said_how_it_ends_has_not_vanished(
    clock: Clock, store: Store, four: list[Heartbeats], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may say so and end between the moment when its sign is read and the one when its process is looked for."""
    monkeypatch.setattr(heartbeats, "is_running", lambda process: False)
    before = store.multi_get

    def late(keys: list[str]) -> list[bytes]:
        lines = before(keys)
        four[1].end(DONE)
        return lines

    monkeypatch.setattr(store, "multi_get", late)
    beat(clock, four[0])
    assert four[0].gone() is None
    assert four[0].signs[1].state == DONE


def test_a_process_id_of_another_machine_or_container_is_not_looked_for(
    clock: Clock, four: list[Heartbeats], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "is_running", lambda process: False)
    monkeypatch.setattr(heartbeats, "_place", lambda: "pid:[1] elsewhere")
    beat(clock, four[0])
    assert four[0].gone() is None


def test_a_store_that_does_not_answer_stops_nobody_from_noticing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is in the first rank, which may hang."""
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeats, "END_SECONDS", 0.2)
    answers = threading.Event()
    answers.set()
    write = store.set

    def hanging(key: str, line: str) -> None:
        answers.wait(60)
        write(key, line)

    monkeypatch.setattr(store, "set", hanging)
    beats = Heartbeats(Launch(1, 2, "srun", local_rank=1), "127.0.0.1", 29500)
    beats.start()
    until = time.monotonic() + 20
    while not store.lines and time.monotonic() < until:
        time.sleep(0.01)
    answers.clear()
    while beats.silent(1.0) is None and time.monotonic() < until:
        beats.look()
        time.sleep(0.01)
    assert beats.silent(1.0) == 0
    began = time.monotonic()
    beats.end(FOLLOWS)
    assert time.monotonic() - began < 10
    answers.set()


def test_a_process_that_was_stopped_itself_blames_nobody(
    clock: Clock, three: list[Heartbeats]
) -> None:
    first = three[0]
    beat(clock, *three)
    clock.now += 1000.0
    first.beat()
    assert first.silent(1.0) is None


def test_the_first_rank_is_silent_for_the_others_when_its_store_has_gone(
    clock: Clock, store: Store
) -> None:
    launches = (Launch(1, 2, "srun"), Launch(1, 2, "torchrun"))
    by_srun, by_torchrun = (Heartbeats(launch, "127.0.0.1", 29500) for launch in launches)
    beat(clock, by_srun, by_torchrun)
    store.has_gone = True
    for _ in range(3):
        beat(clock, by_srun, by_torchrun)
    assert by_srun.silent(1.0) == 0
    assert by_torchrun.silent(1.0) is None, "the store is that of torchrun's agent"


def test_the_sentence_about_a_lost_rank_names_its_process_and_its_log(
    clock: Clock, three: list[Heartbeats], tmp_path: Path
) -> None:
    watch = RankWatch(Launch(0, 3, "srun", nodes=3), [], three[0], tmp_path, timedelta(seconds=20))
    for _ in range(2):
        beat(clock, *three)
    assert watch.lost() is None
    log = log_of(tmp_path, 2)
    os.close(open_log(tmp_path, Launch(2, 3, "srun")))
    for _ in range(20):
        beat(clock, *three[:2])
    who = f"rank 2 (process {os.getpid()} on {three[0].signs[2].host})"
    end = f"before the run was done, so the run ends; its log: {log}"
    assert watch.lost() == f"{who} has given no sign of life for 20 s {end}"
    assert watch.lost(disconnected=True) == f"{who} has ended {end}"
    with log.open("a") as file:
        file.write("Traceback (most recent call last):\nValueError: no such expert\n")
    three[2].end(FAILED)
    beat(clock, *three[:2])
    end = f"before the run was done, so the run ends: ValueError: no such expert; its log: {log}"
    assert watch.lost() == f"{who} has failed {end}"


def test_ranks_that_do_not_meet_are_named(
    clock: Clock, three: list[Heartbeats], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_watch, "RENDEZVOUS_TIMEOUT", 0.0)
    watch = RankWatch(Launch(0, 3, "srun"), [], three[0], tmp_path)
    begin = (
        "rank 0 has waited 0 s for the 3 ranks to meet, and ends: rank 1 and 1 others have not come"
    )
    assert watch.lost() == f"{begin}; it has no log at {log_of(tmp_path, 1)}"
    beat(clock, three[0], three[2])
    beat(clock, three[0], three[2])
    assert str(watch.lost()).startswith(
        "rank 0 has waited 0 s for the 3 ranks to meet, and ends: rank 1 has not come"
    )


def test_what_a_task_prints_goes_to_its_log(tmp_path: Path) -> None:
    def work() -> None:
        print("before")
        redirect_output(tmp_path, Launch(0, 2, "srun"))
        redirect_output(tmp_path, Launch(0, 1))
        print("still")
        for _ in range(2):
            redirect_output(tmp_path, Launch(1, 2, "srun", local_rank=1))
        print("after")
        os.write(2, b"from a library\n")

    result = forked(work)
    assert result.out == "before\nstill\n"
    assert result.err == ""
    lines = log_of(tmp_path, 1).read_text().splitlines()
    assert len(lines) == 3
    assert "rank 1 of 2, node 0" in lines[0]
    assert sorted(lines[1:]) == ["after", "from a library"]


def test_a_log_that_is_a_link_is_not_written(tmp_path: Path) -> None:
    """A run folder from elsewhere may hold one that leads out of it."""
    (tmp_path / "logs").mkdir()
    log_of(tmp_path, 1).symlink_to(tmp_path / "other")
    for _ in range(2):
        with pytest.raises(UserError, match=r"rank-00001.log: cannot be written: "):
            open_log(tmp_path, Launch(1, 2))
        assert not (tmp_path / "other").exists()
        log_of(tmp_path, 1).unlink()
        os.mkfifo(log_of(tmp_path, 1))
    assert log_hint(tmp_path, 1) == f"; it has no log at {log_of(tmp_path, 1)}"
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "logs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"rank-00001.log: cannot be written: "):
        open_log(tmp_path, Launch(1, 2))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_start_is_a_line_and_nothing_to_quote(tmp_path: Path) -> None:
    os.close(open_log(tmp_path, Launch(1, 2)))
    log = log_of(tmp_path, 1)
    assert log_hint(tmp_path, 1) == f"; its log: {log}"
    with log.open("a") as file:
        file.write("moeloom: " + "x" * 400 + "\n\n")
    assert log_hint(tmp_path, 1) == f": {'x' * 300}...; its log: {log}"
    os.close(open_log(tmp_path, Launch(1, 2)))
    assert log_hint(tmp_path, 1) == f"; its log: {log}"


def test_the_version_of_the_code_changes_with_a_source_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("core", "plugins"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "one.py").write_text("x = 1\n")
    monkeypatch.setattr("core.training.machine.CHECKOUT", tmp_path)
    before = code_version([])
    assert before == code_version([])
    assert before.startswith("0.1.0 (source ")
    (tmp_path / "plugins" / "one.py").write_text("x = 2\n")
    assert code_version([]) != before


def test_beats_are_a_second_apart(clock: Clock, three: list[Heartbeats]) -> None:
    first, second, _ = three
    beat(clock, first, second)
    for _ in range(5):
        clock.now += 0.1
        second.beat()
    beat(clock, first)
    assert first.signs[1].count == 1
