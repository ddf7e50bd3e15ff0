"""
`push_to_hub` of model, processor and pipeline against a stand-in for the Hub: an HTTP server on this machine.

It speaks the endpoints that huggingface_hub uses, keeps what is uploaded, and refuses what the Hub would refuse:
requests without the token, uploads whose checksum is wrong, and commits of large files that were never uploaded. Xet,
whose client is a binary, is switched off, as on machines where `hf_xet` is not installed.
"""

import base64
import hashlib
import http.client
import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file

from transformers_llada_uni import hub_card

from .warm_python import listening, write_command


TOKEN = "hf_stand_in"
USER = "tester"
LARGE = 100_000  # bytes; the Hub has larger regular files, but the fixtures should go both ways


class Hub:
    """What the server knows: repositories (path -> content), large objects by checksum, and requests in order."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large_objects: dict[str, bytes] = {}
        self.large_files: dict[str, set[str]] = {}
        self.commits: list[tuple[str, str]] = []
        self.refused: list[str] = []
        self.num_uploads = 0

    @property
    def commit_id(self) -> str:
        return f"{len(self.commits) + 1:040x}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "StandIn"

    def log_message(self, *args: object) -> None:
        pass

    # Requests and answers

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline().strip(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(encoded)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        if code is None:  # "not found" is a normal answer, the others are faults of the client
            self.server.hub.refused.append(f"{self.command} {self.path}: {message}")
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer({"error": message}, status, headers)

    def route(self, routes: dict[str, str]) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        for pattern, name in routes.items():
            if match := re.fullmatch(pattern, path):
                needs_token = not path.startswith(("/objects/", "/api/validate-yaml"))
                if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.refuse(401, "no token")
                with self.server.lock:
                    return getattr(self, name)(*match.groups(), body)
        return self.refuse(501, "the stand-in does not know this endpoint")

    def do_POST(self) -> None:
        self.route(
            {
                r"/api/repos/create": "create",
                r"/api/validate-yaml": "validate_card",
                r"/api/models/([^/]+/[^/]+)/preupload/main": "preupload",
                r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": "batch",
                r"/api/models/([^/]+/[^/]+)/commit/main": "commit",
            }
        )

    def do_PUT(self) -> None:
        self.route({r"/objects/([0-9a-f]{64})": "upload"})

    def do_GET(self) -> None:
        self.route(
            {
                r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)": "download",
                r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?": "info",
                r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?": "tree",
            }
        )

    do_HEAD = do_GET

    # Endpoints

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization'] or USER}/{wanted['name']}"
        status = 409 if name in self.server.hub.repositories else 200
        self.server.hub.repositories.setdefault(name, {})
        self.server.hub.large_files.setdefault(name, set())
        self.answer({"url": f"{self.server.url}/{name}"}, status)

    def validate_card(self, body: bytes) -> None:
        ok = json.loads(body)["content"].startswith("---\n")
        self.answer({"errors": [] if ok else [{"message": "no metadata"}], "warnings": []}, 200 if ok else 400)

    def preupload(self, repository: str, body: bytes) -> None:
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") or file["size"] > LARGE else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": answers})

    def batch(self, repository: str, body: bytes) -> None:
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.hub.large_objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, checksum: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != checksum:
            return self.refuse(400, "checksum")
        self.server.hub.large_objects[checksum] = body
        self.server.hub.num_uploads += 1
        return self.answer({})

    def commit(self, repository: str, body: bytes) -> None:
        hub, message, files = self.server.hub, "", {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = hub.large_objects.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    return self.refuse(400, f"{value['path']} was not uploaded")
                files[value["path"]] = content
                hub.large_files[repository].add(value["path"])
            else:
                return self.refuse(400, f"unknown operation {line['key']}")
        hub.repositories[repository] |= files
        hub.commits.append((repository, message))
        return self.answer({"commitUrl": f"{self.server.url}/{repository}/commit/1", "commitOid": hub.commit_id})

    def download(self, repository: str, file: str, body: bytes) -> None:
        content = self.server.hub.repositories.get(repository, {}).get(file)
        if content is None:
            code = "EntryNotFound" if repository in self.server.hub.repositories else "RepoNotFound"
            return self.refuse(404, f"no {file} in {repository}", code)
        checksum = hashlib.sha256(content).hexdigest()
        return self.answer(content, headers={"ETag": f'"{checksum}"', "X-Repo-Commit": self.server.hub.commit_id})

    def info(self, repository: str, body: bytes) -> None:
        files = self.server.hub.repositories.get(repository)
        if files is None:
            return self.refuse(404, f"no {repository}", "RepoNotFound")
        siblings = [{"rfilename": name} for name in files]
        return self.answer(
            {
                "id": repository,
                "modelId": repository,
                "sha": self.server.hub.commit_id,
                "tags": [],
                "siblings": siblings,
            }
        )

    def tree(self, repository: str, folder: str | None, body: bytes) -> None:
        files = self.server.hub.repositories.get(repository)
        if files is None:
            return self.refuse(404, f"no {repository}", "RepoNotFound")
        inside = {name: content for name, content in files.items() if not folder or name.startswith(f"{folder}/")}
        if folder and not inside:
            return self.refuse(404, f"no {folder} in {repository}", "EntryNotFound")
        entries = []
        for name, content in inside.items():
            checksum = hashlib.sha256(content).hexdigest()
            entry = {"type": "file", "path": name, "size": len(content), "oid": checksum[:40]}
            if name in self.server.hub.large_files[repository]:
                entry["lfs"] = {"oid": checksum, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return self.answer(entries)


class StandIn(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = Hub()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


def make_environment(url: str, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }


PUSH = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor
from diffusers import DiffusionPipeline
import diffusers_llada_uni

converted, saved = Path(sys.argv[1]), Path(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(converted / "model")
processor = AutoProcessor.from_pretrained(converted / "processor")
pipe = DiffusionPipeline.from_pretrained(converted)

model.push_to_hub("tester/model", commit_message="The weights", tags=["tiny"])
model.save_pretrained(saved / "model", max_shard_size="50GB")
model.push_to_hub("tester/sharded", max_shard_size="600KB")
processor.push_to_hub("tester/processor")
processor.save_pretrained(saved / "processor")
processor.push_to_hub("tester/model")

pipe.push_to_hub("tester/pipeline")
pipe.save_pretrained(saved / "pipeline")

api = HfApi()
api.create_repo("tester/with-card")
ModelCard.load(converted / "README.md").push_to_hub("tester/with-card")
pipe.push_to_hub("tester/with-card")

api.create_repo("tester/folder")
api.upload_folder(repo_id="tester/folder", folder_path=converted)
"""

SAME = """
import sys
from pathlib import Path
from transformers import AutoModelForImageTextToText, AutoProcessor
from diffusers import DiffusionPipeline
import diffusers_llada_uni
import torch

local = AutoModelForImageTextToText.from_pretrained(Path(sys.argv[1]) / "model").state_dict()

def same(model):
    state = model.state_dict()
    return state.keys() == local.keys() and all(torch.equal(state[name], local[name]) for name in local)
"""

PULL_MODEL = (
    SAME
    + """
assert same(AutoModelForImageTextToText.from_pretrained("tester/model"))
assert same(AutoModelForImageTextToText.from_pretrained("tester/sharded"))
assert same(AutoModelForImageTextToText.from_pretrained("tester/folder"))
assert same(AutoModelForImageTextToText.from_pretrained("tester/folder", subfolder="model"))
assert type(AutoProcessor.from_pretrained("tester/model")).__name__ == "LLaDAUniProcessor"
assert type(AutoProcessor.from_pretrained("tester/folder", subfolder="processor")).__name__ == "LLaDAUniProcessor"
"""
)

# As a tool does that knows transformers alone.
PULL_BY_STUB = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor

assert "transformers_llada_uni" not in sys.modules
processor = AutoProcessor.from_pretrained("tester/model", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("tester/model", trust_remote_code=True)
assert (type(processor).__name__, type(model).__name__) == ("LLaDAUniProcessor", "LLaDAUniForConditionalGeneration")
"""

PULL_PIPELINE = (
    SAME
    + """
for name in ("tester/pipeline", "tester/folder"):
    pipe = DiffusionPipeline.from_pretrained(name)
    assert type(pipe).__name__ == "LLaDAUniPipeline"
    assert same(pipe.model)
"""
)

TRAIN = """
import sys
from datasets import Dataset
from transformers_llada_uni.training import LLaDAUniSFTConfig, LLaDAUniSFTTrainer

source, output = sys.argv[1:]
chat = [{"role": "user", "content": "Up or down?"}, {"role": "assistant", "content": "Up."}]
args = LLaDAUniSFTConfig(
    output, max_steps=1, block_length=8, per_device_train_batch_size=2, use_cpu=True, report_to="none",
    push_to_hub=True, hub_model_id="tester/trained",
)
trainer = LLaDAUniSFTTrainer(source, args, Dataset.from_dict({"messages": [chat] * 2}))
trainer.train()
trainer.push_to_hub(dataset_name="tester/chats")
"""


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def run(server, tmp_path_factory) -> Iterator[Callable[..., None]]:
    """Runs programs as processes of their own, for which the stand-in is the Hub."""
    folder = tmp_path_factory.mktemp("python")
    python, address = folder / "python", str(folder / "socket")
    write_command(python, address)
    environment = make_environment(server.url, folder / "home")

    def run(program: str, *arguments: Path) -> None:
        command = [str(python), "-c", program, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr[-3000:]}\nrefused: {server.hub.refused}"

    with listening(address, environment):
        yield run


@pytest.fixture(scope="module")
def pushed(run, server, converted_dir, tmp_path_factory) -> tuple[Hub, Path]:
    """The hub after all pushes, and the folder in which the same was saved on disk."""
    folder = tmp_path_factory.mktemp("push")
    run(PUSH, converted_dir, folder)
    return server.hub, folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def card_of(files: dict[str, bytes]) -> ModelCard:
    return ModelCard(files["README.md"].decode())


def test_model_arrives_byte_for_byte_with_a_card(pushed):
    hub, folder = pushed
    files, saved = hub.repositories["tester/model"], files_of(folder / "model")
    assert {"config.json", "generation_config.json", "model.safetensors"} <= saved.keys()
    assert {name: files[name] for name in saved} == saved
    assert json.loads(files["config.json"])["model_type"] == "llada_uni"
    card = card_of(files)
    assert "tiny" in card.data.tags
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert ("tester/model", "The weights") in hub.commits
    assert "pip install llada-uni" in card.text and "load_llada_uni.py" in saved


def test_weights_keep_the_released_expert_names(pushed, official_tiny):
    hub, _ = pushed
    weights = load(hub.repositories["tester/model"]["model.safetensors"])
    released = load_file(official_tiny / "model-00001-of-00002.safetensors")
    name = "layers.1.mlp.experts.2.gate_proj.weight"
    assert weights[f"model.language_model.{name}"].equal(released[f"model.{name}"])


def test_sharded_model_arrives_with_its_index(pushed):
    hub, folder = pushed
    files = hub.repositories["tester/sharded"]
    index = json.loads(files["model.safetensors.index.json"])
    shards = {name for name in files if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == shards
    whole = load_file(folder / "model" / "model.safetensors")
    assert {name for shard in shards for name in load(files[shard])} == set(whole) == set(index["weight_map"])


def test_processor_arrives_byte_for_byte(pushed):
    hub, folder = pushed
    files, saved = hub.repositories["tester/processor"], files_of(folder / "processor")
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= saved.keys()
    assert {name: files[name] for name in saved} == saved
    # A processor next to its model leaves the model's card and weights as they were.
    both = hub.repositories["tester/model"]
    assert {name: both[name] for name in saved} == saved
    assert "tiny" in card_of(both).data.tags
    assert "model.safetensors" in both


def test_pipeline_arrives_byte_for_byte_with_a_card(pushed):
    hub, folder = pushed
    files, saved = hub.repositories["tester/pipeline"], files_of(folder / "pipeline")
    assert {name.split("/")[0] for name in saved if "/" in name} >= {"model", "processor", "transformer", "vae"}
    assert files.keys() - {"README.md"} == saved.keys() - {"README.md"}
    assert {name: files[name] for name in saved} == saved
    assert json.loads(files["model_index.json"])["_class_name"] == "LLaDAUniPipeline"
    card = card_of(files)
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "any-to-any"
    assert "pip install llada-uni" in card.text and 'from_pretrained("tester/pipeline"' in card.text
    assert "license" not in card.data.to_dict()


def test_a_branch_gets_no_card(monkeypatch):
    """It would be committed to the main one."""
    monkeypatch.setattr(hub_card, "create_repo", lambda *args, **kwargs: pytest.fail("nothing is to be pushed"))
    for settings in ({"revision": "draft"}, {"create_pr": True}, {"subfolder": "model"}):
        hub_card.PushedWithCard()._push_card("tester/model", **settings)


def test_pipeline_keeps_a_card_that_is_there(pushed, converted_dir):
    hub, _ = pushed
    ours = ModelCard.load(converted_dir / "README.md")
    kept = card_of(hub.repositories["tester/with-card"])
    assert kept.text == ours.text
    assert kept.data.to_dict() == ours.data.to_dict()
    assert "model_index.json" in hub.repositories["tester/with-card"]


def test_converted_folder_arrives_byte_for_byte(pushed, converted_dir):
    hub, _ = pushed
    assert hub.repositories["tester/folder"] == files_of(converted_dir)
    assert card_of(hub.repositories["tester/folder"]).data.license == "apache-2.0"


def test_large_files_go_as_large_files_and_only_once(pushed):
    hub, _ = pushed
    assert "model.safetensors" in hub.large_files["tester/model"]
    assert "config.json" not in hub.large_files["tester/model"]
    # Model folder and pipeline share contents with each other; no content travels twice.
    assert hub.num_uploads == len(hub.large_objects)


def test_pushed_model_and_processor_load_again(pushed, run, converted_dir):
    run(PULL_MODEL, converted_dir)


def test_the_card_s_snippet_loads_the_model(pushed, run):
    hub, _ = pushed
    [snippet] = re.findall(r"```python\n(.*?)```", card_of(hub.repositories["tester/model"]).text, re.DOTALL)
    run(f'{snippet}\nassert type(model).__name__ == "LLaDAUniForConditionalGeneration"')


def test_without_the_import_the_model_loads_by_its_stub(pushed, run):
    run(PULL_BY_STUB)


def test_pushed_pipeline_loads_again(pushed, run, converted_dir):
    run(PULL_PIPELINE, converted_dir)


def test_trained_model_arrives_with_a_card_of_its_training(run, server, converted_dir, tmp_path):
    run(TRAIN, converted_dir, tmp_path / "trained")
    files = server.hub.repositories["tester/trained"]
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= files.keys()
    card = card_of(files)
    assert card.data.datasets == ["tester/chats"] and "block-diffusion" in card.data.tags
    assert "`block_length` | `8`" in card.text and "text_loss" in card.text


def test_stand_in_refused_nothing(pushed):
    hub, _ = pushed
    assert hub.refused == []


@pytest.mark.parametrize(
    ("method", "path", "content", "token", "status"),
    [
        ("POST", "/api/repos/create", b'{"name": "x", "organization": null}', "wrong", 401),
        ("PUT", f"/objects/{'0' * 64}", b"other bytes", None, 400),
        (
            "POST",
            "/api/models/tester/model/commit/main",
            b'{"key": "lfsFile", "value": {"path": "x.safetensors", "oid": "00", "size": 3}}',
            TOKEN,
            400,
        ),
        ("GET", "/tester/model/resolve/main/nothing.json", b"", TOKEN, 404),
        ("POST", "/api/datasets/tester/x/preupload/main", b"{}", TOKEN, 501),
    ],
)
def test_stand_in_refuses_what_the_hub_would(method, path, content, token, status):
    """The tests above mean something only if bad requests fail."""
    with StandIn() as server:
        server.hub.repositories["tester/model"] = {}
        server.hub.large_files["tester/model"] = set()
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        connection = http.client.HTTPConnection(*server.server_address)
        connection.request(method, path, content, {"Authorization": f"Bearer {token}"} if token else {})
        answer = connection.getresponse()
        connection.close()
        server.shutdown()
    assert answer.status == status


def test_what_is_private_is_private_by_whatever_name(monkeypatch):
    """diffusers takes `private` and `token` by their place, too."""
    made = []

    class Pushed:
        def push_to_hub(self, repo_id, commit_message=None, private=None, token=None, create_pr=False):
            return repo_id

    class Own(hub_card.PushedWithCard, Pushed):
        def _push_card(self, **given):
            made.append(given)

    Own().push_to_hub("tester/secret", "first", True, "token")
    Own().push_to_hub("tester/secret", private=True, create_pr=True)
    assert [given["private"] for given in made] == [True, True]
    assert made[0]["token"] == "token" and made[1]["create_pr"]
