"""A ticket is found by path, by catalog name, or on the hub."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import pytest

import lth_plugins as lth
from lth_plugins import ConfigError, Ticket, TicketCatalog, TicketError
from lth_plugins.ticket.file import read_digest
from lth_plugins.ticket.foreign.checkpoints import read_checkpoint
from lth_plugins.ticket.hub import push

TOOL = Path(__file__).parents[2] / "tools/ticket.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def r18(ticket18_file) -> str:
    """A name in the catalog. What is registered stays, and the same again changes nothing."""
    TicketCatalog.register("r18_of_tests", ticket18_file)
    return "r18_of_tests"


def test_a_name_stands_for_a_path_or_a_function(r18: str, ticket18, ticket18_file) -> None:
    TicketCatalog.register("made_by_tests", lambda: ticket18)
    assert Ticket.load(r18) == Ticket.load("made_by_tests") == Ticket.load(ticket18_file)
    assert {r18, "made_by_tests"} <= {*TicketCatalog.names()}


def test_an_unknown_name_shows_close_ones(r18: str) -> None:
    with pytest.raises(TicketError, match=rf"found 'r81_of_tests'; did you mean {r18}"):
        Ticket.load("r81_of_tests")


def test_a_path_that_does_not_exist_is_called_one(tmp_path) -> None:
    with pytest.raises(TicketError, match="found nothing at .*round_03.ticket: check the path"):
        Ticket.load(str(tmp_path / "round_03.ticket"))


@pytest.mark.parametrize(
    "ref", ["x" * 300, "x" * 300 + ".ticket", "~nobody-here/a.ticket", "a\0/b"]
)
def test_a_reference_that_no_file_can_have_is_refused(ref: str) -> None:
    with pytest.raises(TicketError, match="expected a ticket"):
        Ticket.load(ref)
    for read in (read_digest, read_checkpoint):
        with pytest.raises(TicketError, match="found nothing at"):
            read(Path(ref))


def test_a_name_cannot_look_like_a_path_or_change_its_meaning(r18: str, ticket18_file) -> None:
    for name in ("", "a/b", "a.ticket", "hf://a/b"):
        with pytest.raises(ConfigError, match="must not look like a path"):
            TicketCatalog.register(name, ticket18_file)
    with pytest.raises(ConfigError, match="already names"):
        TicketCatalog.register(r18, "other.ticket")


DIGEST = 64 * "0"
MALFORMED_PATHS = r"""
owner  owner//x  owner/repo/  -owner/repo  owner/re..po  owner/re--po  owner/rëpo  ../repo
/etc/passwd  owner/repo//etc/passwd  owner/repo/../../secret.ticket  owner/repo/..
owner/repo/a\b.ticket  owner/repo/a//b.ticket  owner/repo/./b.ticket
owner/repo/%2e%2e/b.ticket  owner/repo/b.ticket?x=1  owner/repo/b.ticket#x
"""
MALFORMED = [
    *("", "own er/repo", "owner/repo/b c.ticket", "owner/repo/b.ticket\n", "owner/repo/\0.ticket"),
    *MALFORMED_PATHS.split(),
    *(f"owner/repo/{'f' * 256}", f"owner/{'r' * 97}"),
    *(f"owner/repo/..@sha256:{DIGEST}", "owner/repo@sha256:", f"owner/repo@sha256:{DIGEST[1:]}"),
    *(f"owner/repo@sha256:{64 * 'g'}", f"owner/repo@sha256:{64 * 'A'}"),
    *(f"owner/repo@md5:{DIGEST[32:]}", f"owner/repo/b.ticket@{DIGEST}"),
    f"owner/repo@sha256:{DIGEST}/b.ticket",
]


@pytest.mark.parametrize("ref", MALFORMED)
def test_a_malformed_hub_reference_is_refused(ref: str, ticket18) -> None:
    with pytest.raises(TicketError, match="expected hf://owner/repo"):
        Ticket.load(f"hf://{ref}")
    if ref.count("/") == 1:
        with pytest.raises(TicketError, match="expected hf://owner/repo"):
            push(ticket18, ref)


def in_a_process(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: huggingface_hub reads its settings when it is imported."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
    )


LOAD = """
import sys
from lth_plugins import LthError, Ticket
from lth_plugins.ticket.hub import push
for ref in sys.argv[1:]:
    try:
        print(ref, (ticket := Ticket.load(ref)).digest)
    except LthError as error:
        print(ref, error)
try:
    push(ticket, "owner/other")
except LthError as error:
    print(error)
"""


def test_a_cached_hub_ticket_needs_no_network(ticket18, ticket18_file, tmp_path) -> None:
    repo = tmp_path / "hub/models--owner--r18"
    for name in ("r18.ticket", "imp/round_05.ticket"):
        cached = repo / "snapshots" / COMMIT / name
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_bytes(ticket18_file.read_bytes())
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(COMMIT)
    pinned = hashlib.sha256(ticket18_file.read_bytes()).hexdigest()
    refs = [
        "hf://owner/r18",
        f"hf://owner/r18/imp/round_05.ticket@sha256:{pinned}",
        "hf://owner/r50",
    ]
    done = in_a_process("-c", LOAD, *refs, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    default, nested, missing, pushed = done.stdout.splitlines()
    assert default == f"{refs[0]} {ticket18.digest}", done.stderr
    assert nested == f"{refs[1]} {ticket18.digest}"
    assert missing.startswith("hf://owner/r50 cannot fetch r50.ticket of owner/r50")
    assert pushed.startswith("cannot upload other.ticket to owner/other")


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path) -> None:
    asked = []

    class Silent(BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.client_address)  # and hangs up; the hub's own client would try again

    with ThreadingTCPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        done = in_a_process(
            TOOL, "show", "hf://owner/r18", HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path)
        )
        server.shutdown()
    assert "cannot fetch r18.ticket of owner/r18 from the Hugging Face hub: it can" in done.stderr
    assert "cannot be reached" in done.stderr and len(asked) == 1


class Hub(BaseHTTPRequestHandler):
    """What of the Hugging Face hub a download and an upload ask for."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.resolve(head=True)

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):
            names = [{"rfilename": name} for name in self.files]
            self.answer({"id": "owner/r18", "sha": COMMIT, "siblings": names})
        else:
            self.resolve(head=False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if not self.headers.get("Authorization", "").endswith("hf_fake"):
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path.endswith("/repos/create"):
            self.answer({"url": f"http://{self.headers['Host']}/owner/r18", "name": "owner/r18"})
        elif self.path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                f | {"uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        else:
            assert "/commit/" in self.path, self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['Host']}/owner/r18/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def resolve(self, head: bool) -> None:
        data = self.files.get(self.path.partition("/resolve/")[2].partition("/")[2])
        if data is None:
            self.answer({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def answer(self, content: dict, status: int = 200, **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def files() -> dict[str, bytes]:
    """What is on the hub, by name."""
    return {}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[str]:
    handler = type("FreshHub", (Hub,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_card_says_what_the_search_measured_and_what_its_owner_says(
    ticket_tool: Callable[..., Any], ticket18: lth.Ticket, tmp_path: Path
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    path = ticket18.save(tmp_path / "round_05.ticket")
    lines = [
        {"round": 0, "density": 1.0, "val_top1": 0.5},
        {"round": 5, "density": ticket18.density, "val_top1": 0.4321, "val_loss": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    options = ("--license", "mit", "--dataset", "own/photos", "--base-model", "own/resnet")
    done = ticket_tool("push", path, "own/r18", "--dry-run", *options)
    card = huggingface_hub.ModelCard(done.stdout)
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_name) == (43.21, "own/photos")
    assert (card.data.license, card.data.base_model) == ("mit", "own/resnet")
    assert "| top-1 in percent | 43.21 |" in card.text and "licence `mit`" in card.text

    sparser = ticket18.with_masks(lth.prune(ticket18.weights, 0.5, ticket18.masks), {})
    sparser.save(path)  # of the same name, but not what was measured
    assert "model-index" not in ticket_tool("push", path, "own/r18", "--dry-run").stdout
    for option, value, expected in (
        ("--license", "Apache 2.0", "a licence such as apache-2.0"),
        ("--dataset", "a/b/c", "a dataset of the hub"),
        ("--base-model", "resnet50", "a model of the hub, owner/name"),
    ):
        refused = ticket_tool("push", path, "own/r18", "--dry-run", option, value)
        assert refused.returncode == 2 and f"expected {expected}" in refused.stderr
    path.with_suffix(".md").write_text("a card")
    refused = ticket_tool("push", path, "own/r18", "--license", "mit")
    assert refused.returncode == 2 and "state them at the top of" in refused.stderr


def test_what_is_pushed_can_be_loaded(hub: str, files, ticket18, ticket18_file, tmp_path) -> None:
    online = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    pushed = in_a_process(TOOL, "push", ticket18_file, "owner/r18", **online, HF_TOKEN="hf_fake")
    assert pushed.returncode == 0, pushed.stderr
    assert "hf://owner/r18/r18.ticket loads it" in pushed.stdout
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: lth_plugins\n") and ticket18.digest in card
    assert 'lth.Ticket.load("hf://owner/r18")' in card
    files["README.md"] = b"written by its owner"
    named = ticket18_file.with_name("named.ticket")
    ticket18.save(named)
    named.with_suffix(".md").write_text("a card beside the ticket")
    for options in ((), ("--file", "second.ticket")):
        again = in_a_process(
            TOOL, "push", named, "owner/r18", *options, **online, HF_TOKEN="hf_fake"
        )
        assert again.returncode == 0, again.stderr
    assert files["README.md"] == b"written by its owner"
    assert files["second.md"] == b"a card beside the ticket"
    pinned = hashlib.sha256(ticket18_file.read_bytes()).hexdigest()
    refs = [
        f"hf://owner/r18@sha256:{pinned}",
        "hf://owner/r18/other.ticket",
        f"hf://owner/r18@sha256:{'0' * 64}",
    ]
    done = in_a_process("-c", LOAD, *refs, **online, HF_TOKEN="hf_wrong")
    loaded, missing, other, refused = done.stdout.splitlines()
    assert loaded == f"{refs[0]} {ticket18.digest}", done.stderr
    assert f"with the SHA-256 {'0' * 64}, found {pinned}: it is another file" in other
    assert missing.startswith(f"{refs[1]} cannot fetch other.ticket of owner/r18"), missing
    assert refused.startswith("cannot upload") and "hf auth login" in refused
