"""A web server for shards, and tests' ways to date what it serves."""

import os
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from small_datasets import make_small


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, without ranges; what it `tells` of a version is chosen by the server."""

    def do_HEAD(self):
        self.server.heads.append(self.path)
        super().do_HEAD() if self.server.takes_head else self.send_error(405)

    def do_GET(self):
        self.server.gets.append(self.path)
        super().do_GET()

    def send_header(self, name, value):
        if name != "Last-Modified" or self.server.tells in ("date", "nginx"):
            super().send_header(name, value)

    def end_headers(self):
        path = Path(self.translate_path(self.path))
        if self.server.tells == "nginx" and path.is_file():
            stat = path.stat()  # as this server makes it of seconds and bytes
            super().send_header("ETag", f'"{int(stat.st_mtime):x}-{stat.st_size:x}"')
        if self.server.tells == "etag" and path.is_file():
            super().send_header("ETag", f'"{path.stat().st_ino}-{path.stat().st_mtime_ns}"')
        super().end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def serve(folder):
    """A loopback HTTP server over a folder, which gets the small dataset, two hours old."""
    make_small(folder)
    date_it(folder, 7200.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as http:
        http.takes_head, http.tells, http.heads, http.gets = True, "date", [], []
        http.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


def replace(path, first, age_s=3600.0, count=10):
    """Put other samples, from s`first` on, into the shards of a folder, dated `age_s` ago."""
    make_small(path, count=count, first=first)
    date_it(path, age_s)


def date_it(path, age_s):
    for shard in path.glob("*.tar"):
        os.utime(shard, (time.time() - age_s,) * 2)
