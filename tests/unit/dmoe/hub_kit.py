"""A tiny hub on loopback: as much of its HTTP API as fetching a model needs."""

import json
import threading
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """``files`` of one repository ``owner/model``; every request is kept in ``asked`` as (path, range, token)."""

    def __init__(self):
        self.files = {}
        self.asked = []
        self.errors = {}
        """Path to (status, the hub's name of the error)."""
        self.drop_after = None
        """Close the connection after so many bytes of a body, from then on."""
        self.lies = {}
        """Name to another content than the listed hash belongs to."""

    def info(self):
        siblings = [
            {"rfilename": name, "size": len(data), "blobId": "b", "lfs": self._lfs(data)}
            for name, data in self.files.items()
        ]
        return {"_id": "1", "id": "owner/model", "modelId": "owner/model", "sha": COMMIT, "siblings": siblings}

    def _lfs(self, data):
        return {"size": len(data), "sha256": sha256(data).hexdigest(), "pointerSize": 130}


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            path = self.path.partition("?")[0]
            hub.asked.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
            if path in hub.errors:
                status, code = hub.errors[path]
                return self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})
            if path.startswith("/api/models/owner/model"):
                return self._send(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"})
            name = path.removeprefix(f"/owner/model/resolve/{COMMIT}/")
            if name not in hub.files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            data = hub.lies.get(name, hub.files[name])
            if given := self.headers.get("Range"):
                start = int(given.removeprefix("bytes=").partition("-")[0])
                headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
                return self._send(206, data[start:], headers)
            return self._send(200, data, {})

        def _send(self, status, body, headers):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}.items():
                self.send_header(key, value)
            self.end_headers()
            if hub.drop_after is not None and len(body) > hub.drop_after:
                self.wfile.write(body[: hub.drop_after])
                self.close_connection = True
                return
            self.wfile.write(body)

    return Handler


@contextmanager
def serving():
    """A hub and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_at(address, monkeypatch):
    """Have the library ask this hub, and not wait between attempts."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
