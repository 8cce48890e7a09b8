"""The live view: true to runs that are being written, quiet where nothing changed, and local."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from threading import Thread

import pytest
from synthetic_runs import make_run, write_ledger
from test_report_page import Page

from selectflow.cli import main
from selectflow.data import make_digits, read_metadata
from selectflow.report import figures
from selectflow.report.live import LivePage, Watched
from selectflow.report.page import fill
from selectflow.report.runs import ReportError
from selectflow.report.server import Server, open_server
from selectflow.run.directory import lock
from selectflow.run.ledger_files import newest_step
from selectflow.run.log import Tracker
from selectflow.run.samples import Newest, Sample, Shown
from selectflow.run.yaml import dump_yaml

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    make_digits(root, label_noise=0.4)
    return root


@pytest.fixture
def drawn(monkeypatch):
    """Labels of the panels that are drawn."""
    labels, to_svg = [], figures.to_svg

    def count(panel, name):
        labels.append(panel.y_label)
        return to_svg(panel, name)

    monkeypatch.setattr(figures, "to_svg", count)
    return labels


@contextmanager
def served(*patterns):
    """The address of a server of runs, in a thread."""
    with open_server(LivePage([str(pattern) for pattern in patterns]), 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def get(url, path="", **headers):
    request = urllib.request.Request(url + path, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def words(page):
    return " ".join(" ".join(Page(page).text).split())


def begin(path, data=None, **more):
    """A run that has begun: its directory and configuration, and what it logs to."""
    select = {"strategy": "influence", "horizon": 1, "interval": 1, "keep": 16}
    config = {"name": path.name, "seed": 0, "steps": 100, "select": select, "data": data or {}}
    tracker = Tracker(path, config | more, name=path.name)
    (path / "config.yaml").write_text(dump_yaml(config | more))
    return tracker


def test_a_run_is_followed_from_before_it_begins_to_its_end(tmp_path):
    path = tmp_path / "run"
    with served(path) as url:
        assert "waited for: no such directory yet" in words(get(url))
        tracker = begin(path)
        assert "begun: no metrics yet" in words(get(url))
        with lock(path):
            tracker.log(0, {"test/accuracy": 0.125, "perf/wall_s": 0.0})
            assert "running step 0 of 100 test accuracy 12.5 %" in words(get(url))
            with (path / "metrics.jsonl").open("a") as file:
                file.write('{"train/step": 20, "train/lo')  # a line being written
            assert "running step 0 of 100" in words(get(url))
            Tracker(path, {}, name="run").log(
                20,
                {
                    "train/loss": 0.5, "select/kept_fraction": 0.25, "select/horizon": 1.5,
                    "train/lr": 0.003, "perf/step_s": 0.5, "test/accuracy": 0.75,
                },
            )  # fmt: skip
            read = words(get(url))
            for text in (
                "running step 20 of 100 train loss 0.5 test accuracy 75.0 %",
                "kept of each pool 25.0 % horizon 1.5 learning rate 0.003",
                "pace 2 steps/s training left 40 s",
                "Learning curves",
            ):
                assert text in read
            tracker.finish({"status": "finished", "steps": 20})
        read = words(get(url))
        assert "finished step 20 of 100" in read
        assert "training left" not in read


@pytest.mark.parametrize(
    ("status", "facts", "told"),
    [
        ("stopped by SIGTERM", {}, "stopped by a signal, to be resumed"),
        ("failed", {}, "ended by an error"),
        ("failed", {"diverged_at": 11}, "diverged at step 11"),
    ],
)
def test_how_a_run_ended_is_told(tmp_path, status, facts, told):
    tracker = begin(tmp_path / "run")
    tracker.log(10, {"test/accuracy": 0.5})
    live = LivePage([str(tmp_path / "run")])
    assert "at an end without a summary" in words(live.page())
    tracker.finish({"status": status, "steps": 10} | facts)
    assert f"{told} step 10 of 100" in words(live.page())


def test_the_newest_samples_are_those_of_the_last_step(digits, tmp_path):
    keys = list(read_metadata(digits, "train"))
    data = {"name": "digits", "label_noise": 0.4, "root": str(digits)}
    run = make_run(tmp_path / "run", [0.5], status=None, data=data)
    pools = [dict(zip(keys[at : at + 4], (1.0, 4.0, 2.0, 3.0), strict=True)) for at in (0, 4)]
    live = LivePage([str(run.folder)])
    with lock(run.folder):
        write_ledger(run.folder, pools[:1])
        first = live.page()
        write_ledger(run.folder, pools[1:], first=2)  # another part
        second = live.page()
    for page, step, at in ((first, 1, 0), (second, 2, 4)):
        assert f"Of the pool of step {step}" in words(page)
        shown = [attributes["alt"] for tag, attributes in Page(page).found if tag == "img"]
        assert shown == [keys[at + place] for place in (1, 3, 0, 2)]  # kept best, rejected worst
        assert words(page).index("Kept, highest") < words(page).index("Rejected, lowest")
    assert "score +1.34 sd" in words(second)  # (4 - 2.5) / sqrt(5 / 4)


def test_a_pool_whose_scores_are_equal_is_said_to_be_so(digits, tmp_path):
    keys = list(read_metadata(digits, "train"))[:4]
    run = make_run(tmp_path / "run", [0.5], data={"name": "digits", "root": str(digits)})
    write_ledger(run.folder, [dict.fromkeys(keys, 2.0)])
    assert "deviations from the mean of the pool. All are equal." in words(
        LivePage([str(run.folder)]).page()
    )
    write_ledger(run.folder, [dict(zip(keys, range(4), strict=True))], first=2)
    assert "All are equal" not in LivePage([str(run.folder)]).page()


def test_the_newest_step_of_several_processes_is_one_that_all_have_written(tmp_path):
    pools = [{f"{step}": 1.0, f"{step}'": 2.0, f"{step}''": 3.0} for step in range(6)]
    assert newest_step(tmp_path / "selection") is None
    write_ledger(tmp_path, pools[:1])  # in one process, then in two
    assert newest_step(tmp_path / "selection")["key"].to_pylist() == ["0", "0'", "0''"]
    write_ledger(tmp_path, pools[1:3], first=2, rank=0, size=2)
    write_ledger(tmp_path, pools[3:4], first=2, rank=1, size=2)  # it is behind
    found = newest_step(tmp_path / "selection")
    assert found["step"].to_pylist() == [2] * 6
    assert found["key"].to_pylist() == ["1", "1'", "1''", "3", "3'", "3''"]
    assert found["kept"].to_pylist() == [False, True, True] * 2


def test_nothing_is_drawn_again_where_no_metrics_have_changed(tmp_path, drawn):
    tracker = begin(tmp_path / "run")
    tracker.log(10, {"test/loss": 1.0})
    tracker.log(20, {"test/loss": 0.5})
    with served(tmp_path / "run") as url:
        version, page = get(url, "version"), get(url)
        assert f'data-version="{version}"' in page
        num = len(drawn)
        assert num >= 1
        assert (get(url, "version"), get(url)) == (version, page)
        assert len(drawn) == num
        tracker.finish({"status": "finished", "steps": 20})  # it ends, and its curves stay
        assert get(url, "version") != version
        assert "finished" in words(get(url))
        assert len(drawn) == num
        tracker.log(30, {"test/loss": 0.25})
        get(url)
        assert len(drawn) > num


def test_two_runs_are_compared_and_new_ones_found(tmp_path):
    make_run(tmp_path / "runs" / "a", [0.5, 0.75])
    with served(tmp_path / "runs") as url:
        assert "runs/b" not in get(url)
        make_run(tmp_path / "runs" / "b", [0.25, 0.5], strategy="uniform", status=None)
        read = words(get(url))
    assert "online H=1 K=1 (1 seed)" in read
    assert "uniform (1 seed)" in read
    assert re.search(r"runs/a finished step 20 of 100.*runs/b at an end without", read)


def test_runs_that_do_not_compare_are_shown_all_the_same(tmp_path):
    make_run(tmp_path / "a", [0.5])
    make_run(tmp_path / "b", [0.5], data={"name": "digits", "label_noise": 0.1, "seed": 0})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.yaml").write_text("steps: 10\n")
    (tmp_path / "c" / "metrics.jsonl").write_text("no JSON\n")
    read = words(LivePage([str(tmp_path / "*")]).page())
    assert "No comparison runs must be of one task, got data.label_noise 0.4" in read
    assert "a finished step 10 of 100" in read
    assert "not readable:" in read
    assert "must be a JSON object with train/step, got 'no JSON'" in read


def test_what_comes_from_data_is_escaped(tmp_path):
    folder = tmp_path / EVIL.replace("/", "-")
    run = make_run(folder, [0.5], strategy=EVIL, data={"name": "digits", "root": EVIL})
    write_ledger(run.folder, [{f"{EVIL}{n}": float(n) for n in range(4)}])
    page = LivePage([str(folder), f"{tmp_path}/{EVIL}"]).page()
    tags = [(tag, attributes) for tag, attributes in Page(page).found if tag == "script"]
    assert tags == [("script", {"src": "live.js", "defer": None})]
    assert page.count("&lt;script&gt;alert(1)") >= 3
    assert "samples are not shown" in page


def test_samples_are_escaped(tmp_path):
    text = Shown(Sample(EVIL, 1.0, 0, 0), [EVIL], None, EVIL, None)
    picture = Shown(Sample(f'"{EVIL}', 1.0, 0, 0), [], b"png", "", True)
    watched = Watched(EVIL, EVIL, None, [(EVIL, EVIL)], Newest(3, [text], [picture]))
    values = {"title": EVIL, "problem": EVIL, "compared": False, "watched": [watched]}
    page = fill("live.html", values | {"version": "0", "patterns": EVIL})
    assert page.count("<script") == 1
    assert [attributes["alt"] for tag, attributes in Page(page).found if tag == "img"] == [
        f'"{EVIL}'
    ]


# --- the server -------------------------------------------------------------------------------


def test_only_this_machine_can_ask(tmp_path):
    with served(tmp_path / "run") as url:
        port = int(url.rstrip("/").rpartition(":")[2])
        assert url == f"http://127.0.0.1:{port}/"
        others = {
            info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        }
        for host in {*others, "127.0.0.2"} - {"127.0.0.1"}:
            with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
                socket.create_connection((host, port), 1).close()
        # a name that another site has made to point here
        with pytest.raises(urllib.error.HTTPError, match="403"):
            get(url, Host=f"evil.example:{port}")
        assert get(url, Host=f"localhost:{port}")


def test_nothing_else_is_served(tmp_path):
    with served(tmp_path) as url:
        for path in ("../pyproject.toml", "page.py", "config.yaml", "%2e%2e/", "?x=1"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(url, path)
        assert "fetch" in get(url, "live.js")


def test_the_page_may_only_load_what_it_brings(tmp_path):
    make_run(tmp_path / "run", [0.5])
    with served(tmp_path / "run") as url, urllib.request.urlopen(url, timeout=60) as answer:
        policy, page = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'; script-src 'self'" in policy
    assert not re.search(r"<[^>]* on\w+=", page)  # scripts inside a page would not run


def test_a_taken_port_is_an_error_or_the_next_one_is_used(tmp_path, monkeypatch, capsys):
    live = LivePage([str(tmp_path)])
    with Server(live, 0) as server:
        monkeypatch.setattr("selectflow.report.server.DEFAULT_PORT", server.server_port)
        with open_server(live, None) as other:
            assert other.server_port > server.server_port
        assert main(["watch", str(tmp_path), "--port", str(server.server_port)]) == 2
        message = capsys.readouterr().err
        assert f"port must be free to use, got {server.server_port} taken" in message
        with pytest.raises(ReportError, match="--port"):
            open_server(live, server.server_port)


def test_a_run_at_wandb_is_refused():
    with pytest.raises(ReportError, match="must be directories, got wandb:a/b/c"):
        LivePage(["wandb:a/b/c"])


def test_ctrl_c_ends_it_quietly(tmp_path):
    # a shell's background jobs, and their children, ignore the signal
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from selectflow.cli import main; raise SystemExit(main())"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, "watch", "run", "--port", "0"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        line = process.stdout.readline()
        url = re.search(r"watching run at (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)", line)[1]
        assert "no such directory yet" in get(url)
        process.send_signal(signal.SIGINT)
        try:
            assert process.communicate(timeout=60) == ("", "")
        finally:
            process.kill()
        assert process.returncode == 0
