"""transformers' own front doors: its pipelines, its commands `serve` and `chat`, and people who have no llada-uni."""

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from diffusers_llada_uni import embedded_checkpoint
from transformers_llada_uni import LLaDA2MoeForBlockDiffusion, LLaDAUniConfig, LLaDAUniProcessor
from transformers_llada_uni.auto_registration import MODELS
from transformers_llada_uni.chat_templates import CHAT_TEMPLATE
from transformers_llada_uni.checkpoint_stub import AUTO_NAMES


EMOJI = embedded_checkpoint("emoji")
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    image = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(image).ellipse((4, 4, 28, 28), fill="red")
    image.save(path := tmp_path_factory.mktemp("picture") / "red.png")
    return path


@pytest.fixture(scope="module")
def messages(picture) -> list[dict]:
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint as `save_pretrained` of model and processor write it."""
    folder = tmp_path_factory.mktemp("saved") / "emoji"
    AutoModelForImageTextToText.from_pretrained(EMOJI).save_pretrained(folder)
    AutoProcessor.from_pretrained(EMOJI).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answer(messages) -> list[int]:
    """What the model says of the picture, as ids."""
    model, processor = AutoModelForImageTextToText.from_pretrained(EMOJI), AutoProcessor.from_pretrained(EMOJI)
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    return model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :].tolist()


class TestPipelines:
    @pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
    def test_of_the_whole_model(self, task, messages, answer, monkeypatch, caplog):
        # any-to-any asks for torchvision, which it then leaves alone.
        monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
        pipe = pipeline(task, model=str(EMOJI))
        tokenizer = pipe.processor.tokenizer
        wanted = tokenizer.decode(answer, skip_special_tokens=True)
        [found] = pipe(text=messages, max_new_tokens=16, return_full_text=False)
        assert found["generated_text"].strip() == wanted.strip() != ""
        [found] = pipe(text=messages, max_new_tokens=16, return_full_text=False, stop_sequence=wanted.strip()[0])
        assert found["generated_text"].strip() == tokenizer.decode(answer[0]).strip()
        both = pipe(text=[messages, messages], max_new_tokens=16, return_full_text=False, batch_size=2)
        assert [one[0]["generated_text"].strip() for one in both] == [wanted.strip()] * 2
        with pytest.raises(TypeError, match="`num_beams` is not supported by block diffusion"):
            pipe(text=messages, generate_kwargs={"num_beams": 2})
        if task == "any-to-any":
            with pytest.raises(ValueError, match="can only output the following modalities"):
                pipe(text=messages, generation_mode="image")
        assert repr(pipe)
        assert "is not supported for" not in caplog.text

    def test_of_the_backbone(self, official_tiny, caplog):
        pipe = pipeline("text-generation", model=str(official_tiny), mask_token_id=441)
        settings = {"max_new_tokens": 12, "block_length": 4, "eos_token_id": None}
        [found] = pipe("a dog", **settings)
        ids = pipe.tokenizer("a dog", return_tensors="pt").input_ids
        wanted = pipe.model.generate(ids, mask_token_id=441, **settings)[0]
        assert found["generated_text"] == pipe.tokenizer.decode(wanted, skip_special_tokens=True)
        assert len(pipe("a dog", do_sample=True, temperature=2.0, num_return_sequences=2, **settings)) == 2
        assert "is not supported for" not in caplog.text


def test_lists_of_names_and_the_stub_say_what_is_registered():
    for config_class, models in MODELS.items():
        names = {auto_class.__name__: model_class.__name__ for auto_class, model_class in models.items()}
        assert AUTO_NAMES[config_class.__name__] == {"AutoConfig": config_class.__name__} | names
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llada2_moe"] == LLaDA2MoeForBlockDiffusion.__name__
    assert AUTO_NAMES["LLaDAUniProcessor"] == {"AutoProcessor": LLaDAUniProcessor.__name__}


class TestChatTemplate:
    def test_the_shipped_one_is_that_of_the_code(self):
        for folder in (EMOJI, EMOJI / "processor"):
            assert (folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE

    def test_the_message_is_whole(self):
        processor = AutoProcessor.from_pretrained(EMOJI)
        with pytest.raises(Exception, match=r"after one 'system' at most, got 'tool'\.$"):
            processor.apply_chat_template([{"role": "tool", "content": "x"}])


class TestWithoutThePackage:
    """`save_pretrained` leaves a file that says how to load the checkpoint; see `checkpoint_stub`."""

    PROGRAM = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor

source, target = sys.argv[1:]

def load(auto_class, trust_remote_code):
    try:
        print(type(loaded := auto_class.from_pretrained(source, trust_remote_code=trust_remote_code)).__name__)
        return loaded
    except Exception as error:
        print(str(error).replace(chr(10), " "))

sys.modules["transformers_llada_uni"] = None  # as if it were not installed
for auto_class in (AutoProcessor, AutoModelForImageTextToText):
    load(auto_class, False)
    load(auto_class, True)
del sys.modules["transformers_llada_uni"]  # as if it were, but not imported
load(AutoProcessor, False)
load(AutoProcessor, True)
load(AutoModelForImageTextToText, True).save_pretrained(target)
"""

    def test_says_how_to_install_it_and_finds_it(self, saved, tmp_path):
        environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        target = tmp_path / "again"
        command = [sys.executable, "-c", self.PROGRAM, str(saved), str(target)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        *others, processor, model = done.stdout.splitlines()
        for untrusted in others[::2]:
            assert "Please pass the argument `trust_remote_code=True`" in untrusted
        for trusted in others[1::2]:
            assert trusted == "This checkpoint needs the package llada-uni: `pip install llada-uni`."
        assert (processor, model) == ("LLaDAUniProcessor", "LLaDAUniForConditionalGeneration")
        # What is saved again is the same, without a copy of our code.
        assert {path.name for path in target.iterdir()} < {path.name for path in saved.iterdir()}
        assert (target / "config.json").read_bytes() == (saved / "config.json").read_bytes()

    def test_who_has_imported_it_is_not_asked_and_runs_no_file(self, saved):
        for trust_remote_code in (None, True):
            model = AutoModelForImageTextToText.from_pretrained(saved, trust_remote_code=trust_remote_code)
            processor = AutoProcessor.from_pretrained(saved, trust_remote_code=trust_remote_code)
            for loaded in (model, processor):
                assert type(loaded).__module__.startswith("transformers_llada_uni.")
        assert not [name for name in sys.modules if name.endswith("load_llada_uni")]

    def test_a_class_of_a_user_s_own_has_none(self, saved, tmp_path):
        class Config(LLaDAUniConfig):
            pass

        Config.from_pretrained(saved).save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json"}


@contextmanager
def serving(*command: str, home: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    with open(home / "log.txt", "w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 300
            while True:
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1)
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, (home / "log.txt").read_text()[
                        -3000:
                    ]
                    time.sleep(0.25)
            yield f"http://localhost:{port}/v1"
        finally:
            process.kill()
            process.wait()


class TestServeAndChat:
    @pytest.fixture(scope="class")
    def url_and_model(self, tmp_path_factory):
        command = [sys.executable, "-m", "transformers_llada_uni", "serve", str(EMOJI)]
        with serving(*command, home=tmp_path_factory.mktemp("home")) as url:
            yield url, str(EMOJI)

    def test_client_of_openai(self, url_and_model, picture, answer):
        openai = pytest.importorskip("openai")
        url, model = url_and_model
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        data = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": QUESTION}]

        def ask(**settings):
            return client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": content}], max_tokens=16, **settings
            )

        wanted = AutoTokenizer.from_pretrained(EMOJI).decode(answer, skip_special_tokens=True).strip()
        assert ask().choices[0].message.content.strip() == wanted
        assert ask(temperature=0).choices[0].message.content.strip() == wanted
        pieces = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True)]
        assert "".join(pieces).strip() == wanted
        stopped = ask(stop=[wanted[0]])
        assert stopped.usage.completion_tokens == 1 and wanted.startswith(stopped.choices[0].message.content.strip())
        # What cannot be had is refused: a stream says why, and otherwise the server's log does.
        with pytest.raises(openai.APIError) as caught:
            list(ask(frequency_penalty=1.0, stream=True))
        assert "`repetition_penalty` is not supported by block diffusion" in str(caught.value.body)
        with pytest.raises(openai.InternalServerError):
            ask(extra_body={"generation_config": '{"num_beams": 4}'})

    def test_chat_of_transformers(self, url_and_model):
        url, model = url_and_model
        command = [str(Path(sys.executable).with_name("transformers")), "chat", model, url, "max_new_tokens=8"]
        # Offline, huggingface_hub's client would not even reach a server of this machine.
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "COLUMNS": "200"}
        done = subprocess.run(
            command, input="Hello\nn\n!exit\n", env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "tokens in" in done.stdout
