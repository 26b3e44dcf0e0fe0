"""Uploads: what goes up and what never does, that it arrives whole or not at all, and that it loads from there."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import push_to_hub
import pytest
import torch
from glue_samples import tiny_tokenizer
from hub_server import TOKEN, Failure, Hub, serve
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from models import RAGGED, batch, dense_model, keep_units, mask_of
from runs import PRUNING, make_trainer
from safetensors.torch import load, save_file
from strangers import BLOCKER
from test_model_card import REPORT
from transformers.utils import hub as transformers_hub

from hf_vdneuron.how_to_load import TITLE
from hf_vdneuron.hub import push_folder, uploadable_files
from hf_vdneuron.model_card import render_model_card
from hf_vdneuron.modeling_vdneuron import CODE_FILES, PrunedModel
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.persistence import from_pretrained
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.trainer import VDTrainer


#: What the HTTP library says to the client's way of uploading a file.
CLIENT_WARNING = "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"

pytestmark = pytest.mark.filterwarnings(CLIENT_WARNING)

NAME = "me/tiny"
SCRIPT = Path(push_to_hub.__file__)
TOKEN_LIKE = "hf_" + 34 * "x"
CODE = {path.name for path in CODE_FILES}

UPLOADED = {
    ".gitattributes",  # the Hub's own
    "README.md",
    "config.json",
    "figures/curve.png",
    "model.safetensors",
    *CODE,
    "report.html",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
}

#: Loads the repository in a process of its own; the package is blocked if there is a third argument.
LOAD = (
    f"{BLOCKER}"
    """
import json

repo, answers_file, *blocked = sys.argv[1:]
if blocked:
    sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

torch.set_num_threads(1)
answers = load_file(answers_file)
inputs = {name: answers.pop(name) for name in ("input_ids", "attention_mask")}
output = answers.pop("output")
if blocked:
    model = AutoModelForSequenceClassification.from_pretrained(repo, trust_remote_code=True)
else:
    import hf_vdneuron
    model = hf_vdneuron.from_pretrained(repo)
state = model.state_dict()
with torch.no_grad():
    logits = model(**inputs)[0]
print(json.dumps({
    "weights": state.keys() == answers.keys() and all(torch.equal(state[name], answers[name]) for name in state),
    "output": torch.equal(logits, output),
    "tokenizer": AutoTokenizer.from_pretrained(repo)("a b")["input_ids"],
    "imported": "hf_vdneuron" in sys.modules,
}))
"""
)


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    """One server, and one client that keeps its connections, for all tests."""
    with serve() as hub:
        close_session()
        yield hub
        close_session()


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """An empty Hub that this process and its children talk to, with no token, cache or home of the developer's."""
    server.reset()
    home = tmp_path / "home"
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
        monkeypatch.delenv(name)
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HOME": str(home),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # What the client read from the environment when it was imported.
    values = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    return server


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(scope="module")
def model() -> PrunedModel:
    """A pruned model; tests must not change it."""
    dense = dense_model("bert", "sequence_classification")
    return prune_model_(dense, mask_of(keep_units(dense, RAGGED, side=0)))


@pytest.fixture(scope="module")
def saved(model: PrunedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `scripts/sparsify.py` leaves behind; tests must not write to it."""
    folder = tmp_path_factory.mktemp("saved") / "OUT"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    card = render_model_card(REPORT, (), architecture="BertForSequenceClassification", repo_id="OUT", is_cut=True)
    card.save(folder / "README.md")
    write(folder / "report.json", json.dumps(REPORT.to_dict()))
    write(folder / "report.html", "<p>all that was measured</p>")
    write(folder / "figures" / "curve.png", b"\x89PNG")
    return folder


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    """The same, to work with."""
    return shutil.copytree(saved, tmp_path / "OUT")


def state(model: torch.nn.Module) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


# ---- What goes up ----


def test_only_the_allow_list_goes_up(hub: Hub, out: Path) -> None:
    never = ["optimizer.pt", "training_args.bin", "pytorch_model.bin", "x.pkl", ".env", "notes.txt", "data.json"]
    never += ["teacher.safetensors", "trainer_state.json", ".README.md", "figures/notes.txt", "figures/.x.png"]
    never += ["checkpoint-3/model.safetensors", "checkpoint-3/config.json", ".cache/config.json", "other.py"]
    for name in never:
        write(out / name, f"secret {TOKEN_LIKE} of {out}")
    (out / "link.txt").symlink_to(out / "notes.txt")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    commit = push_folder(out, NAME, commit_message="A pruned model")

    assert commit.repo_url == f"{hub.url}/{NAME}"
    repo = hub.repos[NAME]
    assert [commit.message for commit in repo.commits] == ["initial commit", "A pruned model"]
    assert repo.files.keys() == UPLOADED
    for name in UPLOADED - {".gitattributes", "README.md"}:
        assert repo.files[name] == (out / name).read_bytes()
    assert not [name for name, content in repo.files.items() if str(out.parent).encode() in content]
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_the_card_speaks_of_where_it_lies(hub: Hub, out: Path) -> None:
    push_folder(out, NAME)
    text = hub.repos[NAME].files["README.md"].decode()
    assert text == (out / "README.md").read_text().replace('"OUT"', f'"{NAME}"').replace("name: OUT", f"name: {NAME}")
    assert text.count(NAME) == 3


def test_so_does_the_page(hub: Hub, out: Path) -> None:
    load = "<code>model = hf_vdneuron.from_pretrained(&#34;{}&#34;)</code>"
    write(out / "README.md", (out / "README.md").read_text().replace("name: OUT", "name: a&b"))
    write(out / "report.html", load.format("a&amp;b"))
    push_folder(out, NAME)
    assert hub.repos[NAME].files["report.html"].decode() == load.format(NAME)
    assert (out / "report.html").read_text() == load.format("a&amp;b")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        pytest.param("---\nlicense: mit\n---\n", "---\nlicense: mit\n---\n", id="no name"),
        pytest.param(
            '---\nmodel-index:\n- name: \'2\'\n---\nfrom_pretrained("2") from_pretrained("bert")',
            f'---\nmodel-index:\n- name: {NAME}\n---\nfrom_pretrained("{NAME}") from_pretrained("bert")',
            id="another model",
        ),
    ],
)
def test_any_card(card: str, expected: str, hub: Hub, out: Path) -> None:
    write(out / "README.md", card)
    push_folder(out, NAME)
    assert hub.repos[NAME].files["README.md"].decode() == expected


def spoil_link(out: Path) -> None:
    (out / "report.json").unlink()
    (out / "report.json").symlink_to("/etc/hostname")


def spoil_figures(out: Path) -> None:
    (out / "figures").rename(out.parent / "elsewhere")
    (out / "figures").symlink_to(out.parent / "elsewhere")


def spoil_index(out: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    write(out / "model.safetensors.index.json", json.dumps(index))


def spoil_pruning(out: Path) -> None:
    for name in CODE:
        (out / name).unlink()
    patch_model_(dense_model("bert", "sequence_classification")).save_pretrained(out)


def truncate(out: Path) -> None:
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda out: (out / "config.json").unlink(), "has no config.json", id="no config"),
        pytest.param(
            lambda out: (out / "model.safetensors").unlink(), "no weights in `.safetensors`", id="no weights"
        ),
        *(
            pytest.param(lambda out, name=name: (out / name).unlink(), f"no {name}", id=f"no {name}")
            for name in sorted(CODE)
        ),
        pytest.param(spoil_index, "no model-00002-of-00002.safetensors", id="no shard"),
        pytest.param(lambda out: write(out / "config.json", "{"), "config.json` is damaged", id="damaged config"),
        pytest.param(truncate, "model.safetensors` is damaged", id="damaged weights"),
        pytest.param(spoil_link, "`report.json` in .* is a link or no file", id="link"),
        pytest.param(spoil_figures, "`figures/curve.png` in .* is a link", id="link to a folder"),
        pytest.param(lambda out: (out / "vocab.txt").mkdir(), "`vocab.txt` in .* is a link or no file", id="folder"),
        pytest.param(
            lambda out: write(out / "report.json", json.dumps({"command": f"--hub_token={TOKEN_LIKE}"})),
            "`report.json` holds what looks like an access token",
            id="token",
        ),
        pytest.param(
            lambda out: write(out / "report.html", f"<p>from {out}/data</p>"), "`report.html` names the", id="path"
        ),
        pytest.param(
            lambda out: write(out / "README.md", f"saved in '{Path.home()}'"), "`README.md` names the", id="home"
        ),
        pytest.param(spoil_pruning, "not pruned yet", id="patched"),
    ],
)
def test_what_must_not_go_up_is_refused(spoil: Callable[[Path], None], message: str, hub: Hub, out: Path) -> None:
    spoil(out)
    with pytest.raises(ValueError, match=message) as error:
        push_folder(out, NAME)
    assert TOKEN_LIKE not in str(error.value)
    assert hub.requests == []


@pytest.mark.parametrize("text", ["https://example.orgOUT/x", "OUT-2", "hf_vdneuron", f"the {TOKEN_LIKE[:30]}"])
def test_harmless_text_goes_up(text: str, out: Path) -> None:
    write(out / "report.html", text.replace("OUT", str(out)))
    assert uploadable_files(out).keys() == UPLOADED - {".gitattributes"}


# ---- How it arrives ----


def test_a_later_push_is_one_commit_and_leaves_no_old_weights(hub: Hub, out: Path, model: PrunedModel) -> None:
    model.save_pretrained(out, max_shard_size="2KB")
    push_folder(out, NAME)
    assert len([name for name in hub.repos[NAME].files if name.startswith("model-")]) > 1
    model.save_pretrained(out)
    push_folder(out, NAME)
    assert len(hub.repos[NAME].commits) == 3
    assert hub.repos[NAME].files.keys() == UPLOADED
    push_folder(out, NAME)  # nothing changed
    assert len(hub.repos[NAME].commits) == 3


def test_variants_and_foreign_files_of_a_repository_stay(hub: Hub, out: Path) -> None:
    shutil.copyfile(out / "model.safetensors", out / "model.fp16.safetensors")
    push_folder(out, NAME)
    (out / "model.fp16.safetensors").unlink()
    hub.repos[NAME].files["NOTES.md"] = b"by hand"
    push_folder(out, NAME)
    assert hub.repos[NAME].files.keys() == UPLOADED | {"model.fp16.safetensors", "NOTES.md"}


def test_private(hub: Hub, out: Path) -> None:
    push_folder(out, NAME, private=True)
    assert hub.repos[NAME].is_private
    assert state(from_pretrained(NAME)) == state(from_pretrained(out))
    push_folder(out, "me/public")
    with pytest.raises(ValueError, match="exists and is public, but `private` was asked for"):
        push_folder(out, "me/public", private=True)
    assert len(hub.repos["me/public"].commits) == 2


def test_a_big_file_goes_in_parts(hub: Hub, out: Path) -> None:
    hub.chunk_size = 2**20
    save_file({"filler": torch.rand(2**20 - 1000)}, out / "model.safetensors")  # just below 4 MiB
    push_folder(out, NAME)
    assert hub.repos[NAME].files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert hub.count("PUT", r"/lfs/\w+/[1-4]") == 4 + 1  # and the figure


@pytest.mark.parametrize(
    ("failure", "chunk_size"),
    [
        pytest.param(Failure("POST", "/commit/", 500), None, id="commit"),
        pytest.param(Failure("PUT", "/lfs/", 507), None, id="file"),
        pytest.param(Failure("PUT", "/lfs/", 507, skip=2), 4096, id="part"),
        pytest.param(Failure("POST", "/batch", 501), None, id="batch"),
        pytest.param(Failure("POST", "/preupload/", 501), None, id="preupload"),
    ],
)
def test_an_error_in_the_middle_changes_nothing(failure: Failure, chunk_size: int | None, hub: Hub, out: Path) -> None:
    push_folder(out, NAME)
    before = list(hub.repos[NAME].commits)
    save_file({"other": torch.rand(5000)}, out / "model.safetensors")
    hub.chunk_size = chunk_size
    hub.failures.append(failure)
    with pytest.raises(
        OSError, match=rf"cannot push to `{NAME}`: the upload failed, and no file was changed .*{failure.status}"
    ):
        push_folder(out, NAME)
    assert failure.times == 0
    assert hub.repos[NAME].commits == before
    push_folder(out, NAME)
    assert hub.repos[NAME].files["model.safetensors"] == (out / "model.safetensors").read_bytes()


def test_a_hiccup_is_survived(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.failures.append(Failure("PUT", "/lfs/", 503, times=2))
    push_folder(out, NAME)
    assert hub.repos[NAME].files.keys() == UPLOADED


def test_a_hub_without_xet(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(OSError, match=rf"cannot push to `{NAME}`: .* set `HF_HUB_DISABLE_XET=1`"):
        push_folder(out, NAME)
    assert len(hub.repos[NAME].commits) == 1


# ---- The other ways to push ----


def test_model_push_to_hub(hub: Hub, model: PrunedModel, tmp_path: Path) -> None:
    model.push_to_hub(NAME, private=True)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/saved")
    for name in (NAME, "me/saved"):
        files = {".gitattributes", "README.md", "config.json", "model.safetensors", *CODE}
        assert hub.repos[name].files.keys() == files
        assert state(from_pretrained(name)) == state(model)
    assert hub.repos[NAME].is_private


def run_folder(tmp_path: Path, **options: Any) -> tuple[VDTrainer, Path]:
    folder = tmp_path / "run"
    options = {"save_strategy": "steps", "save_steps": 6, **PRUNING, **options}
    trainer = make_trainer(folder, trainer_options={"processing_class": tiny_tokenizer()}, **options)
    return trainer, folder


def test_trainer_push_to_hub(hub: Hub, tmp_path: Path) -> None:
    trainer, folder = run_folder(tmp_path, hub_private_repo=True)
    trainer.train()
    trainer.push_to_hub()
    repo = hub.repos["me/run"]
    expected = {".gitattributes", "README.md", "config.json", "model.safetensors"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "vd_config.json"}
    assert repo.is_private
    assert repo.files.keys() == expected
    assert any(name.endswith(".log_var") for name in load(repo.files["model.safetensors"]))

    pruned = trainer.prune()
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine")
    commit = trainer.push_to_hub(commit_message="Pruned")
    assert commit.repo_url.repo_id == "me/run"
    assert [commit.message for commit in repo.commits] == ["initial commit", "End of training", "Pruned"]
    assert repo.files.keys() == expected | CODE
    assert repo.files["README.md"].endswith(b"mine")
    assert (folder / "training_args.bin").exists()  # and it stayed here
    assert state(from_pretrained("me/run")) == state(pruned)

    future = trainer.push_to_hub("In the background", blocking=False, license="mit", token=TOKEN)
    assert future.result().repo_url.repo_id == "me/run"
    card = repo.files["README.md"].decode()
    assert "mine" not in card
    assert 'model = hf_vdneuron.from_pretrained("me/run")' in card
    assert 'model = AutoModelForSequenceClassification.from_pretrained("me/run", trust_remote_code=True)' in card


def test_a_card_drafted_before_the_cut_is_drafted_again(hub: Hub, tmp_path: Path) -> None:
    trainer, folder = run_folder(tmp_path)
    trainer.train()
    trainer.push_to_hub()
    assert TITLE not in (folder / "README.md").read_text()
    trainer.prune()
    trainer.push_to_hub()
    assert (folder / "README.md").read_text().count(TITLE) == 1
    assert TITLE.encode() in hub.repos["me/run"].files["README.md"]


def test_a_training_run_uploads_no_pickles(hub: Hub, tmp_path: Path) -> None:
    trainer, _ = run_folder(tmp_path, push_to_hub=True, hub_model_id=NAME, hub_always_push=True)
    trainer.train()
    repo = hub.repos[NAME]
    messages = ["initial commit", "Training in progress, step 6", "Training in progress, step 12"]
    assert [commit.message for commit in repo.commits] == messages
    trainer.save_model()
    assert repo.commits[-1].message == "Model save"
    names = {name for commit in repo.commits for name in commit.files}
    assert names <= UPLOADED | {"vd_config.json"}
    assert "model.safetensors" in names


def test_other_processes_push_nothing(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, folder = run_folder(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer._push_from_checkpoint(str(folder))
    assert trainer.push_to_hub() is None
    assert hub.requests == []


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_cannot_be_pushed(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`hub_strategy` is `{strategy}`: checkpoints hold pickles"):
        run_folder(tmp_path, push_to_hub=True, hub_strategy=strategy)


# ---- The script, and processes of their own ----


def run_python(*arguments: str | Path, folder: Path) -> str:
    """Run Python with this test's Hub, away from the sources."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-W", CLIENT_WARNING, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_pushed_by_the_script_it_loads_through_both_doors(hub: Hub, out: Path, model: PrunedModel) -> None:
    root = out.parent
    assert run_python(SCRIPT, out, "--repo_id", NAME, "--private", folder=root) == f"{hub.url}/{NAME}\n"
    assert hub.repos[NAME].is_private
    with torch.no_grad():
        answers = {**batch(), "output": model(**batch())[0], **model.state_dict()}
    save_file(answers, root / "answers.safetensors")
    tokens = tiny_tokenizer()("a b")["input_ids"]
    for blocked in ([], ["blocked"]):
        verdict = json.loads(run_python("-c", LOAD, NAME, root / "answers.safetensors", *blocked, folder=root))
        assert verdict == {"weights": True, "output": True, "tokenizer": tokens, "imported": not blocked}


def nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave all as it is."""


def unreachable(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port `discard`, where nobody listens


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        pytest.param(nothing, ["OUT/none", "--repo_id=me/x"], "none` is no folder: expected", id="no folder"),
        pytest.param(nothing, ["OUT/figures", "--repo_id=me/x"], "has no config.json and no weights", id="no model"),
        pytest.param(nothing, ["OUT", "--repo_id=a/b/c"], "'a/b/c'", id="bad name"),
        pytest.param(nothing, ["OUT", "--repo_id=you/x"], "does not let this access token write there", id="not mine"),
        pytest.param(nothing, ["OUT"], "--repo_id", id="no name"),
        pytest.param(nothing, ["OUT", "--repo_id=me/x", "--speed=2"], "unknown arguments", id="unknown flag"),
        pytest.param(
            lambda out, monkeypatch: monkeypatch.setenv("HF_TOKEN", "hf_wrong"),
            ["OUT", "--repo_id=me/x"],
            "the Hub refused the access token: log in again with `hf auth login`",
            id="wrong token",
        ),
        pytest.param(
            lambda out, monkeypatch: monkeypatch.delenv("HF_TOKEN"),
            ["OUT", "--repo_id=me/x"],
            "there is no access token: log in with `hf auth login`",
            id="no token",
        ),
        pytest.param(unreachable, ["OUT", "--repo_id=me/x"], "http://127.0.0.1:9 cannot be reached", id="no Hub"),
    ],
)
def test_one_line_errors(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    flags: list[str],
    message: str,
    hub: Hub,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(out, monkeypatch)
    with pytest.raises(SystemExit) as exit_:
        push_to_hub.main([flag.replace("OUT", str(out)) for flag in flags])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert "hf_wrong" not in error
    assert TOKEN not in error
    assert hub.repos == {}
