# SPDX-License-Identifier: Apache-2.0
"""Every bad input: its exit code, one line that says what to do, and nothing left behind."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import model_zoo
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers

from pkt_ext import cli
from pkt_ext.streaming.checkpoint import Checkpoint
from pkt_ext.streaming.progress import Progress
from pkt_ext.streaming.rows import RowFile

ROWS = [{"prompt": f"{i} and {i}?", "completion": str(2 * i)} for i in range(3)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A pair and a data file with which everything works."""
    return model_zoo.save_pair(tmp_path_factory.mktemp("sound"), ROWS)


@pytest.fixture
def place(sound, tmp_path):
    """A copy to damage, and the arguments of `pkt seeking` for it."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path


def arguments(place, *more):
    paths = {name: str(place / name) for name in ("teacher", "student")}
    given = [f"--{name}={path}" for name, path in paths.items()]
    return ["seeking", *given, f"--data={place / 'rows.jsonl'}", f"--out={place / 'out'}",
            "--rank=4", "--device=cpu", *more]  # fmt: skip


def refused(place, capfd, argv, code=2):
    """Run, check the form of the refusal, return its one line."""
    before = sorted(p.name for p in place.iterdir())
    capfd.readouterr()
    assert cli.run(argv) == code
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    (line,) = err.splitlines()
    assert line.startswith("pkt: error: ") and len(line) < 700
    assert sorted(p.name for p in place.iterdir()) == before
    return line


def rewrite(folder, change):
    """Apply `change` to a saved model's tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_sound_one_works(place, capfd):
    assert cli.run(arguments(place)) == 0
    out, err = capfd.readouterr()
    assert "windows from teacher blocks" in out and err == ""
    assert sorted(p.name for p in place.iterdir()) == ["out", "rows.jsonl", "student", "teacher"]


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_missing_folder(place, capfd, who):
    shutil.rmtree(place / who)
    assert str(place / who) in refused(place, capfd, arguments(place))


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_no_safetensors(place, capfd, who):
    (place / who / "model.safetensors").unlink()
    line = refused(place, capfd, arguments(place))
    assert str(place / who) in line and "safetensors" in line


def test_bin_checkpoint_prints_the_convert_command(place, capfd):
    tensors = load_file(place / "teacher" / "model.safetensors")
    (place / "teacher" / "model.safetensors").unlink()
    torch.save(tensors, place / "teacher" / "pytorch_model.bin")
    assert f"pkt convert {place / 'teacher'} " in refused(place, capfd, arguments(place))


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("length", [0, 5, 700, -1])
def test_truncated_safetensors(place, capfd, who, length):
    path = place / who / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    line = refused(place, capfd, arguments(place))
    assert str(path) in line and "again" in line


def test_broken_config(place, capfd):
    (place / "teacher" / "config.json").write_text("{")
    assert str(place / "teacher") in refused(place, capfd, arguments(place))


def test_no_tokenizer(place, capfd):
    for path in (place / "teacher").glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refused(place, capfd, arguments(place))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "no messages"}\n', ":1: no 'messages' and no 'prompt'"),
        ('{"messages": []}\n', ":1: 'messages' is not a list with at least one message"),
        ("", "has no rows"),
        ("not json\n", ":1: not JSON"),
    ],
)
def test_bad_rows(place, capfd, content, says):
    (place / "rows.jsonl").write_text(content)
    line = refused(place, capfd, arguments(place))
    assert f"{place / 'rows.jsonl'}" in line and says in line and "expected" in line


def test_missing_data_file(place, capfd):
    (place / "rows.jsonl").unlink()
    assert "give a JSON-lines file" in refused(place, capfd, arguments(place))


def test_rank_larger_than_a_side(place, capfd):
    line = refused(place, capfd, arguments(place, "--rank=17"))
    assert "self_attn.k_proj" in line and "the largest possible --rank is 16" in line


def test_student_wider_in_every_matrix(place, capfd):
    model_zoo.save(model_zoo.build("llama_gqa", hidden=64, ffn=96), place / "student")
    line = refused(place, capfd, arguments(place))
    assert "no matrix can be extracted" in line and "choose a wider teacher" in line


def test_student_wider_in_some_matrices_goes_on(place, capfd):
    model_zoo.save(model_zoo.build("llama_gqa", ffn=96), place / "student")
    assert cli.run(arguments(place)) == 0
    assert "skipped mlp.up_proj: up is 96 x 32 in the student" in capfd.readouterr().err
    report = json.loads((place / "out" / "report.json").read_text())
    assert len(report["skipped"]) == 3


def test_mismatched_vocabularies(place, capfd):
    vocabulary = model_zoo.VOCAB + 8
    model_zoo.save(model_zoo.build("llama_gqa", vocab=vocabulary), place / "student")
    line = refused(place, capfd, arguments(place))
    assert "vocabularies" in line and "--vocabulary shared" in line and "--no-embeddings" in line


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(place, capfd, name, value):
    rewrite(place / "teacher", lambda t: t[name].view(-1)[3].fill_(value))
    line = refused(place, capfd, arguments(place))
    assert "NaN" in line and name.removesuffix(".weight") in line


def test_a_sample_that_overflows_is_named_or_left_out(place, capfd):
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    bad = {"prompt": "ZZZ", "completion": "Z"}
    (place / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, bad]))
    token = 3 + sorted(pre_tokenizers.ByteLevel.alphabet()).index("Z")

    def change(tensors):  # "Z" is the largest number of float16, and every block adds to it
        tensors["model.embed_tokens.weight"][token].fill_(65504.0)
        tensors["model.layers.0.mlp.down_proj.weight"].mul_(300)

    rewrite(place / "teacher", change)
    line = refused(place, capfd, arguments(place, "--dtype=float16"))
    assert "'rows.jsonl:4'" in line and "--nonfinite skip-sample" in line
    assert cli.run(arguments(place, "--dtype=float16", "--nonfinite=skip-sample")) == 0
    found = json.loads((place / "out" / "report.json").read_text())
    ((skipped),) = found["nonfinite_samples"]
    assert skipped["id"] in line and "NaN or Inf" in skipped["reason"]
    (place / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shutil.move(place / "out", place / "skipped")
    assert cli.run(arguments(place, "--dtype=float16")) == 0
    for name in ("start/adapter_model.safetensors", "delta/adapter_model.safetensors"):
        assert (place / "out" / name).read_bytes() == (place / "skipped" / name).read_bytes()
    (place / "rows.jsonl").write_text(json.dumps(bad) + "\n")
    line = refused(
        place, capfd, arguments(place, "--dtype=float16", "--overwrite", "--nonfinite=skip-sample")
    )
    assert "NaN or Inf" in line  # no row is left


def test_a_nan_where_no_sample_looks(place, capfd):
    # an unused token's embedding: no gradient reaches it, yet it would be in the window
    rewrite(place / "teacher", lambda t: t["model.embed_tokens.weight"][-1].fill_(float("nan")))
    line = refused(place, capfd, arguments(place))
    assert "NaN" in line and "embed_tokens" in line


def test_every_target_truncated_away(place, capfd):
    line = refused(place, capfd, arguments(place, "--max-length=20"))
    assert "none of the 3 rows keeps a token to predict" in line and "raise --max-length" in line


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["finetune", "--student=absent", "--data=rows.jsonl"], "absent"),
        (["finetune", "--student=student", "--data=empty.jsonl"], "empty.jsonl has no rows"),
        (["finetune", "--student=student", "--data=bare.jsonl"], "bare.jsonl:1: no 'messages'"),
        (["finetune", "--student=student", "--adapter=absent", "--data=rows.jsonl"], "absent"),
        (["finetune", "--student=student", "--data=rows.jsonl", "--max-length=9"], "--max-length"),
        (["merge", "--student=student", "--adapter=absent"], "absent"),
        (["merge", "--student=student", "--adapter=init"], "run pkt finetune on it first"),
        (["merge", "--student=student", "--adapter=init", "--dtype=int8"], "dtype is 'int8'"),
        (["convert", "absent", "new"], "absent"),
        (["convert", "student", "new"], "holds safetensors already"),
    ],
)
def test_the_other_verbs_refuse_alike(place, capfd, monkeypatch, argv, says):
    monkeypatch.chdir(place)
    (place / "empty.jsonl").touch()
    (place / "bare.jsonl").write_text("{}\n")
    if "--adapter=init" in argv:
        assert cli.run([a if "--out" not in a else "--out=init" for a in arguments(place)]) == 0
    out = [] if argv[0] == "convert" else ["--out=new"]
    assert says in refused(place, capfd, [*argv, *out])


def test_out_that_cannot_be(place, capfd, monkeypatch):
    monkeypatch.chdir(place)
    argv = [a for a in arguments(place) if "--out" not in a]
    for out in ("/", ".", "x" * 255, "rows.jsonl/x"):
        assert "choose another --out" in refused(place, capfd, [*argv, f"--out={out}"])


@pytest.mark.parametrize("name", ["teacher", "student", "data", "out"])
def test_an_empty_option_is_not_the_working_directory(tmp_path, place, capfd, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")  # an empty folder could be replaced by the output
    argv = [a for a in arguments(place) if not a.startswith(f"--{name}=")]
    assert f"--{name} is missing" in refused(place, capfd, [*argv, f"--{name}="])


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "floaty"])
def test_a_dtype_that_is_none(place, capfd, dtype):
    path = place / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": dtype}))
    assert str(place / "teacher") in refused(place, capfd, arguments(place))


def test_many_rows_without_a_target_are_one_line(place, capfd):
    rows = [{"id": f"r{i}", "prompt": "x" * 50, "completion": "y"} for i in range(9)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, [*ROWS, *rows])))
    assert cli.run(arguments(place, "--max-length=40")) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("9 of 12 rows left out (r0: ") and "8 more" in line


def test_out_exists(place, capfd):
    assert cli.run(arguments(place)) == 0
    assert "choose another --out" in refused(place, capfd, arguments(place))
    assert cli.run(arguments(place, "--overwrite")) == 0


def test_full_disk_before_the_start(place, capfd, monkeypatch):
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    line = refused(place, capfd, arguments(place), code=75)
    assert "disk full" in line and "free some space" in line


def test_a_disk_too_small_for_the_activations(place, capfd, monkeypatch):
    real = shutil.disk_usage

    def usage(path):
        found = real(path)
        return found._replace(free=1000) if str(path).endswith(".progress") else found

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("a weight was read"))
    line = refused(place, capfd, arguments(place), code=75)
    assert "activations" in line and "larger disk" in line


# The limit on file sizes stands for a disk that fills up: the same error reaches the writers.
FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.argv[0] = "pkt"
from pkt_ext.cli import main
main()
"""


def test_full_disk_while_writing(place):
    before = sorted(p.name for p in place.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", FULL, *arguments(place)], capture_output=True, text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    (line,) = done.stderr.splitlines()
    assert "disk full" in line and "free some space" in line
    assert sorted(p.name for p in place.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["seeking"], "--teacher is missing"),
        (["seeking", "--nonsense"], "No such option"),
        (["seeking", "--rank", "many"], "valid integer"),
        (["dance"], "No such command"),
        (["verify", "nowhere"], "no such folder"),
        (["transfer", "nowhere.yaml", "--out=x"], "cannot read nowhere.yaml"),
    ],
)
def test_command_lines_that_cannot_be(tmp_path, capfd, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(tmp_path, capfd, argv)


# --- pkt laten ------------------------------------------------------------------------------------


def laten_arguments(place, *more):
    paths = {"teacher": "teacher", "student": "student", "locate": "rows.jsonl"}
    paths |= {"align": "rows.jsonl", "out": "out"}
    given = [f"--{name}={place / path}" for name, path in paths.items()]
    return ["laten", *given, "--rate=0.2", "--rows=2", "--device=cpu", *more]


def test_the_sound_laten_works(place, capfd, no_bars):
    assert cli.run(laten_arguments(place)) == 0
    out, err = capfd.readouterr()
    assert "8 matrices changed as step 3 of 3 has it" in out and err == ""
    assert sorted(p.name for p in place.iterdir()) == ["out", "rows.jsonl", "student", "teacher"]
    assert "choose another --out" in refused(place, capfd, laten_arguments(place))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rate=0.01"], "is 0 of the student's 32 attention neurons of a block, the teacher has"),
        (["--rate=0.01", "--modules=up"], "is 0 of the student's 48 ffn neurons.*raise --rate"),
        (["--rate=0"], "rate is 0.0; give a share above 0, up to 1"),
        (["--modules=gate"], "modules is 'gate'; give some of up,down,v,o"),
        (["--steps=4"], "4 steps need as many rows to locate by, and 3 of 3 have .* lower --steps"),
        (["--inject-step=4"], "inject_step is 4, of 3 steps; lower it"),
        (["--patience=1"], "patience needs rows to hold out: give --holdout"),
        (["--blocks=3"], "blocks is 3; one of the models has 2, give at most those"),
        (["--learning-rate=0"], "learning_rate is 0.0; give a positive number"),
        (["--neurons=best"], "neurons is 'best'; choose one of located, random"),
        (["--export=gguf"], "export is 'gguf'; choose one of adapter"),
        (["--compat=published"], "compat published computes in float16, not float32"),
        (["--compat=published", "--mode=first-order"], "no first-order scores"),
        (["--max-length=9"], "none of the 3 rows .* --max-length"),
        (["--locate="], "--locate is missing"),
        (["--align=absent.jsonl"], "absent.jsonl"),
        (["--holdout=absent.jsonl"], "absent.jsonl"),
        (["--budget=many"], "'many' is no amount of memory"),
        (["--export=adapter", "--overwrite=no"], "--overwrite"),
    ],
)
def test_laten_refuses_before_it_starts(place, capfd, monkeypatch, options, says):
    monkeypatch.chdir(place)
    assert re.search(says, refused(place, capfd, laten_arguments(place, *options)))


def test_laten_in_several_processes(place, capfd, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    line = refused(place, capfd, laten_arguments(place))
    assert "pkt laten runs in one process; start it without a launcher" in line


def test_a_teacher_with_fewer_neurons_than_the_rate_asks_for(place, capfd):
    model_zoo.save(model_zoo.build("llama_gqa", ffn=200), place / "student")
    line = refused(place, capfd, laten_arguments(place, "--rate=0.5"))
    assert "0.5 is 100 of the student's 200 ffn neurons" in line
    assert "the teacher has 80; lower --rate" in line
    assert cli.run(laten_arguments(place, "--rate=0.4")) == 0


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_the_published_ranking_knows_llamas_alone(place, capfd, who):
    sizes = model_zoo.TEACHER if who == "teacher" else model_zoo.STUDENT
    model_zoo.save(model_zoo.build("gpt2", **sizes), place / who)
    options = ["--compat=published", "--dtype=float16"]
    line = refused(place, capfd, laten_arguments(place, *options))
    assert "leave it out for GPT2LMHeadModel" in line


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_laten_names_weights_that_are_not_finite(place, capfd, who, name):
    rewrite(place / who, lambda t: t[name].view(-1)[3].fill_(float("nan")))
    line = refused(place, capfd, laten_arguments(place))
    assert "NaN" in line and name in line


def test_laten_that_runs_away_says_so_and_leaves_nothing(place, capfd, no_bars):
    options = ["--lr=1e30", "--regulariser=0", "--schedule=constant"]
    line = refused(place, capfd, laten_arguments(place, *options))
    assert re.search("step [23]: .*lower --learning-rate", line) and "kept" not in line
    assert cli.run(laten_arguments(place, "--lr=1e-3")) == 0


def test_the_smallest_budget_of_laten_works(place):
    """In processes of their own: this one holds what the tests before it have left."""

    def run(budget):
        return subprocess.run(
            [sys.executable, "-m", "pkt_ext", *laten_arguments(place, f"--budget={budget}")],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    done = run("100MiB")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    least = re.search(r"the smallest --budget that works is (\d+ MiB)", line)[1]
    assert not (place / "out.progress").exists()
    done = run(least)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((place / "out" / "report.json").read_text())
    assert all(cost["peak_bytes"] <= report["budget"] for cost in report["passes"].values())


def test_full_disk_before_laten(place, capfd, monkeypatch):
    """Its checkpoints, a hypernetwork each, are larger than what it leaves."""
    usage, network = shutil.disk_usage(place), 4 * 4 * 48 * (48 + 32)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6 * network))
    line = refused(place, capfd, laten_arguments(place), code=75)
    assert "disk full" in line and "free some space" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12 * network))
    assert cli.run(laten_arguments(place)) == 0


# --- pkt semalign ---------------------------------------------------------------------------------


def semalign_arguments(place, *more):
    paths = {"teacher": "teacher", "student": "student", "data": "rows.jsonl", "out": "out"}
    given = [f"--{name}={place / path}" for name, path in paths.items()]
    return ["semalign", *given, "--rank=4", "--steps=2", "--batch=2", "--micro-batch=2",
            "--map-cache=none", "--device=cpu", "-q", *more]  # fmt: skip


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def published(place):
    return json.loads((place / "out" / "report.json").read_text())


LONG = {"prompt": "x" * 200, "completion": "y"}


def test_the_sound_semalign_works(place, capfd, no_bars):
    assert cli.run(semalign_arguments(place)) == 0
    out, err = capfd.readouterr()
    assert "2 phases; KL to the teacher on held-out rows" in out and err == ""
    assert sorted(p.name for p in place.iterdir()) == ["out", "rows.jsonl", "student", "teacher"]
    assert "choose another --out" in refused(place, capfd, semalign_arguments(place))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--objective=magic"], "objective is 'magic'; choose one of cosine, fisher, geometry"),
        (["--objective=finetune", "--map=frames"], "leave map out"),
        (["--pairing=similarity"], "add --schedule frontier, or leave pairing out"),
        (["--batch=4", "--micro-batch=3"], "micro_batch 3 does not divide batch 4"),
        (["--modules=nose"], "modules is 'nose'; give some of q,k,v,o,gate,up,down"),
        (["--hold-out=1"], "hold_out is 1.0; give 0 <= hold_out < 1"),
        (["--lr=0"], "learning_rate is 0.0; give a positive number"),
        (["--max-length=9"], "student: none of the 3 rows .* raise --max-length"),
        (["--prompt-format=chat"], "the tokenizer has no chat template; use published"),
        (["--data=absent.jsonl"], "absent.jsonl.*give a JSON-lines file"),
        (["--holdout=absent.jsonl"], "absent.jsonl.*give a JSON-lines file"),
        (["--unrelated=absent.jsonl"], "absent.jsonl.*give a JSON-lines file"),
        (["--holdout=empty.jsonl"], "empty.jsonl has no rows"),
        (["--holdout=long.jsonl", "--max-length=100"], "rows to hold out: student: none of the 2"),
        (["--unrelated=long.jsonl", "--max-length=100"], "none of the 2 rows"),
        (["--data=long.jsonl", "--max-length=100"], "none of the 2 rows .* raise --max-length"),
        (["--teacher="], "--teacher is missing"),
        (["--holdout="], "the name of a data file is empty; give a JSON-lines file"),
        (["--device=cuda:99"], "device 'cuda:99' cannot be used here; use --device cpu"),
    ],
)
def test_semalign_refuses_before_it_starts(place, capfd, monkeypatch, options, says):
    monkeypatch.chdir(place)
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("a weight was read"))
    (place / "empty.jsonl").touch()
    write_rows(place / "long.jsonl", LONG, LONG)
    assert re.search(says, refused(place, capfd, semalign_arguments(place, *options)))


def test_semalign_in_several_processes(place, capfd, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    line = refused(place, capfd, semalign_arguments(place))
    assert "pkt semalign runs in one process; start it without a launcher" in line


def test_a_single_row_is_trained_on_and_none_held_out(place, capfd):
    write_rows(place / "rows.jsonl", ROWS[0])
    assert cli.run(semalign_arguments(place, "--hold-out=0.5")) == 0
    assert "no rows were held out to look at" in capfd.readouterr().out
    assert published(place)["rows"] == {"trained": 1, "held_out": 0, "unrelated": 0}


def test_rows_are_held_out_of_those_that_are_left(place):
    """Whichever are drawn: a row too long to be read is no row to look at."""
    write_rows(place / "rows.jsonl", *[LONG] * 8, *ROWS)
    others = f"--unrelated={write_rows(place / 'others.jsonl', LONG, *ROWS)}"
    assert cli.run(semalign_arguments(place, "--max-length=100", others)) == 0
    report = published(place)
    assert report["rows"] == {"trained": 2, "held_out": 1, "unrelated": 3}
    assert len(report["dropped"]) == 8 + 1


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_tokenizers_that_share_too_little(place, capfd, who):
    tokens = model_zoo.tokenizer()
    content = json.loads(tokens.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < 40}
    tokens._tokenizer = Tokenizer.from_str(json.dumps(content))
    tokens.save_pretrained(place / who)
    line = refused(place, capfd, semalign_arguments(place))
    assert "the tokenizers share 40 tokens, but hidden size 48 takes as many at least" in line
    assert "choose a pair of models whose vocabularies overlap" in line


def test_tokens_that_a_model_has_no_row_for(place, capfd):
    model_zoo.save(model_zoo.build("llama_gqa", **model_zoo.STUDENT, vocab=100), place / "student")
    line = refused(place, capfd, semalign_arguments(place))
    assert "student: sample 'rows.jsonl:" in line
    assert "outside the model's vocabulary of 100; use the model's own tokenizer" in line


def test_modules_that_the_student_does_not_have(place, capfd):
    model_zoo.save(model_zoo.build("gpt2", **model_zoo.STUDENT), place / "student")
    line = refused(place, capfd, semalign_arguments(place, "--modules=gate"))
    assert "transformer.h.0" in line and "has q,k,v,o,up,down; give some of these" in line


@pytest.mark.parametrize(
    ("bits", "options", "says"),
    [
        (4, [], "no gradient passes on a CPU; use the unquantised student"),
        (8, ["--train=block"], "cannot be trained themselves; use --train lora"),
    ],
)
def test_semalign_refuses_quantised_students(place, capfd, no_bars, bits, options, says):
    settings = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        place / "student", quantization_config=settings, device_map={"": "cpu"}
    )
    model_zoo.save(packed, place / "student")
    assert says in refused(place, capfd, semalign_arguments(place, *options))


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_semalign_names_weights_that_are_not_finite(place, capfd, no_bars, who, name):
    rewrite(place / who, lambda t: t[name].view(-1)[3 :: t[name].shape[-1]].fill_(float("nan")))
    line = refused(place, capfd, semalign_arguments(place))
    assert "NaN" in line and name in line and "download or convert it again" in line


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_head_of_zeros(place, capfd, who):
    rewrite(place / who, lambda t: t["lm_head.weight"].zero_())
    line = refused(place, capfd, semalign_arguments(place))
    assert f"{who}: lm_head.weight is all zero; choose a model that was trained" in line


def test_a_nan_in_a_row_of_the_head_that_no_token_has(place, capfd, no_bars):
    rewrite(place / "student", lambda t: t["lm_head.weight"][-1].fill_(float("nan")))
    assert "lm_head.weight holds NaN" in refused(place, capfd, semalign_arguments(place))
    options = ["--output=kl", f"--unrelated={place / 'rows.jsonl'}"]  # the tokens shared alone
    line = refused(place, capfd, semalign_arguments(place, *options))
    assert "lm_head.weight holds NaN" in line
    assert cli.run(semalign_arguments(place, *options[:1])) == 0


@pytest.mark.parametrize(
    ("factor", "says"),
    [
        (1e5, "sample 'rows.jsonl:.' gives NaN or Inf in the student"),
        (1e6, "student: model.layers.0.mlp.down_proj.weight holds NaN or Inf"),
    ],
)
def test_a_student_too_large_for_float16(place, capfd, no_bars, factor, says):
    rewrite(place / "student", lambda t: t["model.layers.0.mlp.down_proj.weight"].mul_(factor))
    line = refused(place, capfd, semalign_arguments(place, "--dtype=float16"))
    assert re.search(says, line) and "use --dtype float32 or bfloat16" in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lr=1e30"], "block 0: step 2: .* lower --learning-rate"),
        (["--lr=1e30", "--objective=fisher"], "step 2: .* lower --learning-rate"),
        (["--lr=1e30", "--objective=distillation"], "step 2: .* lower --learning-rate"),
        # no later loss sees the last step
        (["--lr=1e39", "--steps=1", "--hold-out=0", "--critical=1"], "trained; lower --learning"),
        (["--lr=1e25", "--steps=1", "--critical=1", "--train=block"], "lower --learning-rate"),
    ],
)
def test_a_semalign_that_runs_away_says_so_and_leaves_nothing(place, capfd, no_bars, options, says):
    line = refused(place, capfd, semalign_arguments(place, "--warmup=0", *options))
    assert re.search(says, line) and "kept" not in line


def test_a_folder_for_maps_that_cannot_be_is_a_warning(place, capfd, no_bars):
    argv = [each for each in semalign_arguments(place, "--steps=1") if each != "-q"]
    assert cli.run([*argv, f"--map-cache={place / 'rows.jsonl' / 'maps'}"]) == 0
    assert f"was not kept in {place / 'rows.jsonl' / 'maps'}" in capfd.readouterr().err
    assert published(place)["map"]["cached"] is False


def test_a_damaged_map_is_built_again(place, capfd, no_bars):
    argv = [each for each in semalign_arguments(place, "--steps=1") if each != "-q"]
    argv += [f"--map-cache={place / 'maps'}", "--overwrite"]
    found = []
    for damaged in (False, False, True, False):
        if damaged:
            (path,) = (place / "maps").iterdir()
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        assert cli.run(argv) == 0
        assert ("is damaged" in capfd.readouterr().err) == damaged
        weights = (place / "out" / "adapter_model.safetensors").read_bytes()
        found.append((published(place)["map"]["cached"], weights))
    assert [cached for cached, _ in found] == [False, True, False, True]
    assert len({weights for _, weights in found}) == 1


def test_full_disk_before_semalign(place, capfd, monkeypatch):
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("a weight was read"))
    line = refused(place, capfd, semalign_arguments(place), code=75)
    assert "disk full" in line and "free some space" in line


@pytest.mark.parametrize(
    ("owner", "name", "kept"),
    [
        (os, "posix_fallocate", True),  # the targets' files
        (RowFile, "write", True),
        (Progress, "save", True),  # what a phase has learned
        (Progress, "record", False),  # the first
    ],
)
def test_full_disk_in_the_middle_of_semalign(place, capfd, no_bars, monkeypatch, owner, name, kept):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert cli.run(semalign_arguments(place)) == 75
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert out == "" and "disk full" in line and "free some space" in line
    assert not (place / "out").exists() and (place / "out.progress").exists() == kept
    assert (f"kept in {place / 'out.progress'}" in line) == kept
    assert cli.run(semalign_arguments(place)) == 0
    assert sorted(p.name for p in place.iterdir()) == ["out", "rows.jsonl", "student", "teacher"]
