"""A report's page that follows a running job: made anew as the job writes, and served to this machine alone.

Nothing but the page and the plotting library is served, so that no path leads to a file. A page takes seconds of a
processor of large jobs, whose machine trains: it is made when somebody looks, and takes at most a tenth of one then.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from perseus_plugin.errors import ConfigError, PerseusError, os_problem
from perseus_plugin.exchange.serving import BoundedHttp
from perseus_plugin.files import encoded
from perseus_plugin.reporting.report.document import document, library
from perseus_plugin.reporting.report.findings import Options, find
from perseus_plugin.reporting.report.folder import load_folder
from perseus_plugin.reporting.report.page import page

_SOON_S, _REST = 2.0, 9.0  # between two pages at least; and so many times as long as the last one took
_QUIET_S = 60.0  # what has become of a job that writes nothing is looked at as often
Tagged = tuple[str, bytes]
"""A tag that changes with the content, and the content."""
_LOOPBACK = "127.0.0.1"
_HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.ASCII | re.IGNORECASE)
"""How a page of this machine may be asked for; through a tunnel the port is another one."""
_SCRIPT = "/plotly.js"
_HEAD = f"""<script src="{_SCRIPT}"></script>
<style>
html {{ overflow-anchor: none; }}
#followed {{ position: fixed; right: 12px; bottom: 12px; padding: 2px 10px; border-radius: 6px; opacity: 0.9;
  background: var(--note); border: 1px solid var(--line); font-size: 13px; }}
</style>
<script>
// Parts that have changed take the place of what was there; pictures are drawn into what was there, so that what was
// zoomed stays zoomed, and the part that was on top of the window stays there.
(() => {{
  const shown = new Map(), usual = new Map();
  let tag = "";
  const key = part => part.id || part.tagName + "." + part.className;
  const top = part => part.getBoundingClientRect().top;

  // Ranges of a picture's axes, by name.
  const axes = div => Object.entries(div.layout).filter(([name, axis]) => /^[xy]axis/.test(name) && axis.range);
  const ranges = div => Object.fromEntries(axes(div).map(([name, axis]) => [name, String(axis.range)]));

  function draw(id, data, layout, config) {{
    const div = document.getElementById(id), before = usual.get(id) || {{}}, zoomed = {{}};
    for (const [name, axis] of div.layout ? axes(div) : [])
      if (name in before && before[name] !== String(axis.range)) {{
        zoomed[name] = before[name];
        layout[name] = {{...layout[name], range: axis.range, autorange: false}};
      }}
    return Plotly.react(div, data, layout, config).then(() => usual.set(id, {{...ranges(div), ...zoomed}}));
  }}

  function update(fresh) {{
    const main = document.querySelector("main"), had = new Map([...main.children].map(part => [key(part), part]));
    const seen = [...main.children].find(part => part.getBoundingClientRect().bottom > 0), was = seen && top(seen);
    const redrawn = [];
    const parts = [...fresh.querySelector("main").children].map(part => {{
      const old = had.get(key(part)), text = part.outerHTML;
      if (old && shown.get(key(part)) === text) return old;
      shown.set(key(part), text);
      redrawn.push(...[...part.querySelectorAll("script")].map(script => script.textContent));
      if (!old || !old.querySelector(".js-plotly-plot") || !part.querySelector(".plotly-graph-div"))
        return document.adoptNode(part);
      for (const what of ["h2", "p"]) old.querySelector(what).replaceWith(part.querySelector(what));
      return old;
    }});
    for (const part of had.values()) if (!parts.includes(part)) part.remove();
    parts.forEach((part, at) => main.children[at] === part || main.insertBefore(part, main.children[at] || null));
    const drawing = {{...Plotly, newPlot: draw}};
    for (const script of redrawn) new Function("Plotly", script)(drawing);
    const now = seen && parts.find(part => key(part) === key(seen));
    if (now) scrollBy(0, top(now) - was);
  }}

  async function follow() {{
    const said = document.getElementById("followed");
    if (!document.hidden) try {{
      const answer = await fetch("/", {{cache: "no-store", headers: {{"If-None-Match": tag}}}});
      if (!answer.ok && answer.status !== 304) throw answer.status;
      if (answer.ok) {{
        update(new DOMParser().parseFromString(await answer.text(), "text/html"));
        tag = answer.headers.get("ETag");
      }}
      said.textContent = "follows the job";
    }} catch {{
      said.textContent = "no longer followed: perseus report --serve has ended";
    }}
    setTimeout(follow, {int(1000 * _SOON_S)});
  }}

  addEventListener("load", () => {{
    for (const div of document.querySelectorAll(".js-plotly-plot")) usual.set(div.id, ranges(div));
    document.body.insertAdjacentHTML("beforeend", '<div id="followed">follows the job</div>');
    follow();
  }});
}})();
</script>
"""


class Followed:
    """The newest page of a job's folder.

    Args:
        folder: output folder of a job, which may have written nothing yet.
        options: what the reader wants to know.
        clock: monotonic, seconds.
        processor: seconds of a processor that this thread has taken.
    """

    def __init__(
        self,
        folder: Path,
        options: Options,
        clock: Callable[[], float] = time.monotonic,
        processor: Callable[[], float] = time.thread_time,
    ) -> None:
        self._folder, self._options, self._clock, self._processor = folder, options, clock, processor
        self._making = threading.Lock()
        self._state: object = None
        self._made_s = self._again_s = -1.0
        self._page: Tagged = "", b""

    def __call__(self) -> Tagged:
        """The page, made anew where it is time to."""
        with self._making:
            now_s = self._clock()
            if not self._page[0] or now_s >= self._again_s:
                state = list(_files(self._folder))
                if state != self._state or now_s >= self._made_s + _QUIET_S:
                    began_s = self._processor()
                    self._state, self._page = state, _tagged(self._make())
                    self._made_s = self._clock()
                    self._again_s = self._made_s + max(_SOON_S, _REST * (self._processor() - began_s))
            return self._page

    def _make(self) -> bytes:
        try:
            return encoded(page(find(load_folder(self._folder), self._options), _HEAD))
        except (PerseusError, OSError) as error:  # it may be there the next time
            why = os_problem(error) if isinstance(error, OSError) else str(error)
            said = f"Nothing to show: {html.escape(why)}. It is looked at again."
            note = f'<section class="note" id="nothing">{said}</section>'
            return encoded(document("Perseus report", ["<h1>Perseus report</h1>", note], _HEAD))


class Server(BoundedHttp, HTTPServer):
    """Serves a page on this machine, to programs of it.

    Args:
        followed: what is to be served.
        port: of the loopback address; 0: any that is free.

    Raises:
        ConfigError: the port is none, or taken.
    """

    longest_s = 600.0  # a page of a large job is long in the making on a busy machine

    def __init__(self, followed: Followed, port: int) -> None:
        script = _tagged(library().encode())
        self.answers: dict[str, tuple[str, Callable[[], Tagged]]] = {
            "/": ("text/html; charset=utf-8", followed),
            _SCRIPT: ("text/javascript; charset=utf-8", lambda: script),
        }
        try:
            super().__init__((_LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            why = os_problem(error) if isinstance(error, OSError) else "ports end at 65535"
            raise ConfigError(f"--serve: got {port}: {why}; allowed: a free port, or 0 for any") from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self.server_name}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    timeout = 5.0  # between what a caller says and the next
    server: Server

    def do_GET(self) -> None:
        # A page from elsewhere may have its name lead to this machine, and would read ours in its reader's browser.
        if _HERE.fullmatch(self.headers.get("Host", "")) is None:
            self.send_error(403)
            return
        kind, answers = self.server.answers.get(self.path, ("", None))
        if answers is None:
            self.send_error(404)
            return
        tag, content = answers()
        known = self.headers.get("If-None-Match") == tag
        self.send_response(304 if known else 200)
        for name, value in (("Content-Type", kind), ("ETag", tag), ("Cache-Control", "no-cache")):
            self.send_header(name, value)
        self.send_header("Content-Length", str(0 if known else len(content)))
        self.end_headers()
        if not known:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """That somebody looks is no news."""


def _tagged(content: bytes) -> Tagged:
    return f'"{hashlib.sha256(content).hexdigest()}"', content


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    """All files with sizes and times, of which some may go while they are looked at."""
    for at, _, names in os.walk(folder):
        for path in (Path(at, name) for name in sorted(names)):
            with suppress(OSError):
                found = path.stat()
                yield str(path), found.st_size, found.st_mtime_ns
