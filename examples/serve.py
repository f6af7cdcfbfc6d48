"""Serve recommendations over HTTP, and reload the model without downtime.

    python examples/serve.py               # measure: a server on a free port, and 1,000 requests
    python examples/serve.py shop.tpuals   # serve this file on port 8000

The file is one that `Recommender.save` wrote, or a JSON file such as the ``current.json`` of
``examples/nightly.py``, which names the model. Replace it atomically (`Recommender.save` and
`os.replace` do), and the server loads the new one in the background. Requests in flight keep the
old one. A file that does not load is reported by ``/health``, and the old model stays in use.

    GET  /health
    GET  /recommend/ann?n=10
    POST /recommend          {"users": ["ann", "bob"], "n": 10}
    POST /history            {"history": [{"item": "tea", "value": 2}], "n": 10}

Needs the packages of the extra `examples`: pip install "tpu-als[examples]".
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tpu_als import Recommender, TPUAlternatingLeastSquares

try:
    import httpx
    import uvicorn
    from fastapi import Body, FastAPI, HTTPException
except ImportError as error:
    print(f"skipped: {error.name} is not installed: pip install 'tpu-als[examples]'")
    sys.exit(0)


class Models:
    """The model in use, `now`. `reload_if_changed` replaces it; a call that has read it goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error = ""
        self.loaded = self._signature()
        self.now = Recommender.load(self._file())

    def _file(self) -> Path:
        if self.path.suffix != ".json":
            return self.path
        return self.path.parent / json.loads(self.path.read_text())["model"]

    def _signature(self) -> tuple[int, int, int]:
        found = self.path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size

    def reload_if_changed(self) -> None:
        """Load a new file, if there is one."""
        try:
            signature = self._signature()
            if signature == self.loaded:
                return
            new = Recommender.load(self._file())
        except (OSError, ValueError) as error:  # also ModelFileError
            self.error = f"{type(error).__name__}: {error}"
            return
        self.now, self.loaded, self.error = new, signature, ""


def app_of(path: Path, seconds_between_looks: float = 1.0) -> FastAPI:
    """The application for a file."""
    models = Models(path)

    async def look() -> None:
        while True:
            await asyncio.sleep(seconds_between_looks)
            await asyncio.to_thread(models.reload_if_changed)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        models.now.recommend(models.now.users_[:1])  # loads the compiled loops
        looking = asyncio.create_task(look())
        yield
        looking.cancel()

    app = FastAPI(lifespan=lifespan)
    app.state.models = models

    # FastAPI runs functions without async in threads. A call reads models.now once.
    @app.get("/health")
    def health() -> dict[str, Any]:
        rec = models.now
        return {"users": len(rec.users_), "items": len(rec.items_), "reload_error": models.error}

    @app.get("/recommend/{user}")
    def recommend_to_one(user: str, n: int = 10) -> list[dict[str, Any]]:
        rec = models.now
        is_number = pd.api.types.is_integer_dtype(rec.users_) and user.lstrip("-").isdigit()
        return answer(rec.recommend, [int(user) if is_number else user], n)

    @app.post("/recommend")
    def recommend_to_many(users: list[str] | list[int], n: int = Body(10)) -> list[dict[str, Any]]:
        return answer(models.now.recommend, users, n)

    @app.post("/history")
    def recommend_for_history(
        history: list[dict[str, Any]], n: int = Body(10)
    ) -> list[dict[str, Any]]:
        return answer(models.now.recommend_for_history, history, n)

    return app


def answer(recommend: Any, given: Any, n: int) -> list[dict[str, Any]]:
    """Records of a frame; errors of the input become status 422 with their message."""
    if not 1 <= n <= 1000:
        raise HTTPException(422, f"n must be from 1 to 1000, got {n}")
    try:
        return recommend(given, n=n).to_dict("records")
    except (TypeError, ValueError) as error:
        raise HTTPException(422, str(error)) from error


def made_up(n_users: int = 20_000, n_items: int = 5_000, n_events: int = 300_000) -> Recommender:
    """A recommender of this size, fitted to random events."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(n_users, size=n_events), rng.zipf(1.3, n_events) % n_items
    events = {"user": [f"u{user}" for user in users], "item": [f"i{item}" for item in items]}
    model = TPUAlternatingLeastSquares(factors=64, iterations=5, random_state=0)
    return Recommender(model=model).fit(pd.DataFrame(events), show_progress=False)


def measure(n_requests: int = 1_000) -> None:
    """Serve a made-up model, send requests one after the other, and reload meanwhile."""
    # asyncio sends small answers at once only where the socket says that it is TCP's.
    tcp = socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    with tempfile.TemporaryDirectory() as folder, socket.socket(*tcp) as free:
        path = Path(folder) / "shop.tpuals"
        rec = made_up()
        rec.save(path)
        free.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app_of(path, 0.2), log_level="warning")
        server = uvicorn.Server(config)
        serving = threading.Thread(target=server.run, kwargs={"sockets": [free]})
        serving.start()
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        with httpx.Client(base_url=address, timeout=30) as client:
            while not server.started:
                time.sleep(0.05)
            print("health:", client.get("/health").raise_for_status().json())
            send(client, rec, n_requests, path)
            print("health:", client.get("/health").raise_for_status().json())
        server.should_exit = True
        serving.join()


def send(client: httpx.Client, rec: Recommender, n_requests: int, path: Path) -> None:
    """Send requests of each kind, and print their times. A new model comes after half of them."""
    users = np.random.default_rng(1).choice(rec.users_, (n_requests, 100)).tolist()
    kinds = {
        "one user": ("GET", lambda i: f"/recommend/{users[i][0]}", lambda _: None),
        "100 users": ("POST", lambda _: "/recommend", lambda i: {"users": users[i]}),
        "a history": (
            "POST", lambda _: "/history", lambda i: {"history": [{"item": f"i{i % 50 + 1}"}]}
        ),
    }  # fmt: skip
    for name, (method, address, body) in kinds.items():
        count = n_requests if name == "one user" else n_requests // 10
        times = []
        for i in range(count):
            if name == "one user" and i == count // 2:
                rec.update(pd.DataFrame({"user": ["somebody new"], "item": ["i1"]}))
                rec.save(path)
            begin = time.perf_counter()
            client.request(method, address(i), json=body(i)).raise_for_status()
            times.append(1000 * (time.perf_counter() - begin))
        p50, p99 = np.percentile(times, [50, 99])
        print(f"{count:5} requests for {name:>9}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        uvicorn.run(app_of(Path(sys.argv[1])), host="127.0.0.1", port=8000)
    else:
        measure()
