# SPDX-License-Identifier: Apache-2.0
"""`python -m pkt_ext.compat SCRIPT` against `python SCRIPT`: what is replaced, what is left alone,
and that nothing else differs. The scripts are stand-ins, odd on purpose.
"""

import subprocess
import sys
import textwrap

import pytest

OURS = "pkt_ext.compat: "

# --- a script, run ------------------------------------------------------------------------------


def write(folder, files: dict[str, str | bytes]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())


def python(folder, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")


def compat(folder, *arguments: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The finished process, its stderr without our lines, and our lines."""
    done = python(folder, "-m", "pkt_ext.compat", *arguments)
    lines = done.stderr.splitlines(keepends=True)
    done.stderr = "".join(line for line in lines if not line.startswith(OURS))
    return done, [line.removeprefix(OURS).rstrip() for line in lines if line.startswith(OURS)]


def same_as_plain(folder, *arguments: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run a script both ways; what compat gave, once it is known to equal what Python gives."""
    plain = python(folder, *arguments)
    done, lines = compat(folder, *arguments)
    assert done.returncode == plain.returncode
    assert done.stdout == plain.stdout
    assert done.stderr == plain.stderr
    return done, lines


def test_a_script_sees_what_python_would_show_it(tmp_path):
    script = """
        import sys
        print(__file__, sys.argv, sys.path[0], __name__, __spec__, __package__, __doc__)
        print(sorted(globals()), type(__builtins__), sys.modules["__main__"].__dict__ is globals())
    """
    write(tmp_path, {"desk/sub/random.py": script, "elsewhere/x": ""})
    (tmp_path / "desk/link.py").symlink_to(tmp_path / "desk/sub/random.py")
    for path in ("sub/random.py", "./sub/random.py", "../desk/sub/random.py", "link.py"):
        done, lines = same_as_plain(tmp_path / "desk", path, "--fix", "-h", "rest")
        assert done.returncode == 0 and "'--fix', '-h', 'rest'" in done.stdout
        assert lines == ["nothing was recognised: the script ran as it is"]
    same_as_plain(tmp_path / "elsewhere", str(tmp_path / "desk/sub/random.py"))


RAISING = {
    "an exception": "def f():\n    raise ValueError('words')\nf()\n",
    "a cause": """
        def f():
            try:
                {}["key"]
            except KeyError as error:
                raise RuntimeError("no key") from error
        f()
    """,
    "a context": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    [][1]\n",
    "a group": "raise ExceptionGroup('both', [ValueError(1), TypeError(2)])\n",
    "a note": "error = ValueError(1)\nerror.add_note('look here')\nraise error\n",
    "a module's": "import helper\nhelper.fail()\n",
    "an import's": "import raising\n",
    "an import of nothing": "import there_is_no_such_module\n",
    "a module's syntax": "import unreadable\n",
    "its own syntax": "print('never')\nvalue = = 3\n",
    "its indentation": "if True:\nprint('never')\n",
    "a wrong call": "def svd(mat, r):\n    return 1\nsvd(1)\n",
    "an excepthook": """
        import sys
        sys.excepthook = lambda kind, error, trace: print(kind, error, trace.tb_lineno)
        raise ValueError("to stdout")
    """,
    "a thread": """
        import threading
        def work():
            raise ValueError("in a thread")
        thread = threading.Thread(target=work, name="worker")
        thread.start()
        thread.join()
    """,
    "sys.exit(3)": "import sys\nsys.exit(3)\n",
    "sys.exit()": "import sys\nsys.exit()\n",
    "sys.exit(words)": "import sys\nsys.exit('words')\n",
    "os._exit": "import os\nprint('flushed', flush=True)\nos._exit(7)\n",
    "an interrupt": "raise KeyboardInterrupt\n",
    "a warning": "import warnings\nwarnings.warn('old')\nprint('a' is 'b')\n",
}


@pytest.mark.parametrize("case", RAISING)
def test_exit_code_output_and_traceback_are_the_scripts(tmp_path, case):
    recognised = "def svd(mat, r):\n    return 1\n"  # so that the module is one that we load
    helper = recognised + "def fail():\n    raise OSError('helper')\n"
    write(
        tmp_path,
        {
            "script.py": RAISING[case],
            "helper.py": helper,
            "raising.py": recognised + "raise ValueError('while importing')\n",
            "unreadable.py": recognised + "value = = 3\n",
        },
    )
    done, _ = same_as_plain(tmp_path, "script.py")
    assert (done.returncode == 0) == (case in ("sys.exit()", "a thread", "a warning"))


ENCODED = {
    "future": '''\
        """Words."""
        from __future__ import annotations
        def svd(mat: nothing, r: nowhere):
            return 1
        print(__doc__, svd.__annotations__)
    ''',
    "latin-1": "# coding: latin-1\ndef svd(mat, r):\n    'é'\nprint(ascii(svd.__doc__))\n".encode(
        "latin-1"
    ),
    "BOM": b"\xef\xbb\xbf" + "def svd(mat, r):\n    'é'\nprint(ascii(svd.__doc__))\n".encode(),
    "line ends": b"def svd(mat, r):\r\n    return 1\r\nprint(1)\r\n",
}


@pytest.mark.parametrize("case", ENCODED)
def test_sources_are_read_as_python_reads_them(tmp_path, case):
    write(tmp_path, {"script.py": ENCODED[case], "imports.py": "import script\n"})
    done, lines = same_as_plain(tmp_path, "script.py")
    assert (done.returncode, lines) == (0, ["replaced: __main__.svd"])
    done, lines = same_as_plain(tmp_path, "imports.py")
    assert (done.returncode, lines) == (0, ["replaced: script.svd"])


def test_an_expression_too_deep_for_a_tree_runs_nevertheless(tmp_path):
    deep = "+".join(["1"] * 2000)
    write(tmp_path, {"script.py": f"def svd(mat, r):\n    return 1\nprint({deep})\n"})
    done, _ = same_as_plain(tmp_path, "script.py")  # newer Pythons have deeper trees
    assert done.stdout == "2000\n"


def test_a_script_without_a_script(tmp_path):
    write(tmp_path, {"folder/x": ""})
    done = python(tmp_path, "-m", "pkt_ext.compat")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python -m pkt_ext.compat [--fix] SCRIPT.py")
    assert python(tmp_path, "-m", "pkt_ext.compat", "--fast", "script.py").returncode == 2
    assert python(tmp_path, "-m", "pkt_ext.compat", "--help").stdout.startswith("usage: ")
    done, lines = compat(tmp_path, "missing.py")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    assert lines == ["cannot read missing.py: No such file or directory; give a Python script"]
    done, lines = compat(tmp_path, "folder")
    assert done.returncode == 2 and lines[0].startswith("cannot read folder: Is a directory")


# --- what is recognised ---------------------------------------------------------------------------


def test_what_a_script_defines_is_replaced_before_it_is_used(tmp_path):
    script = """
        import functools

        def logged(function):
            @functools.wraps(function)
            def wrapper(*args, **kwargs):
                return function(*args, **kwargs)
            return wrapper

        @logged
        def svd(mat, r=16):
            return 1

        if True:
            try:
                raise KeyError
            except KeyError:
                def max_sens_submatrix(sens, tgt_x, tgt_y):
                    return 2

        with open(__file__):
            select_top_k_layers = lambda sensitivity, args: []

        if __name__ == "__main__":
            for function in (svd, max_sens_submatrix, select_top_k_layers):
                print(function.__module__, function.__qualname__, hasattr(function, "_pkt_ext_fix"))
    """
    write(tmp_path, {"script.py": script})
    done, lines = compat(tmp_path, "script.py")
    assert done.stdout.splitlines() == [
        "__main__ svd True",
        "__main__ max_sens_submatrix True",
        "__main__ <lambda> True",
    ]
    names = ("svd", "max_sens_submatrix", "select_top_k_layers")
    expected = [f"replaced: __main__.{name}" for name in names]
    assert lines == [f"{expected[0]}, without its decorators", *expected[1:]]


def test_what_is_not_recognised_is_left_alone_and_named(tmp_path):
    script = """
        def svd(mat, rank):
            return "own svd"

        def resize_params(*params, sens, tgt_x, tgt_y):
            return "own resize"

        class sum_submatrix:
            pass

        compute_summed_area_table = 3

        async def max_sens_submatrix(sens, tgt_x, tgt_y):
            pass

        def select_top_k_layers(sensitivity, args):
            yield 1

        def bare(function):
            return lambda *args: "decorated"

        @bare
        def calculate_sensitivity(model, tokenizer, data, device="cpu", loss_on_output=True):
            pass

        class KnowledgeNeurons:
            def knowledge_injection(self, teacher_weights, student_weights, quiet=False):
                return "own injection"

        class Knowledge_translator:
            pass

        print(svd(1, rank=2), resize_params(), sum_submatrix, compute_summed_area_table)
        print(list(select_top_k_layers(1, 2)), calculate_sensitivity(1, 2, 3))
        print(KnowledgeNeurons().knowledge_injection(1, 2))
    """.replace("resize_params()", "resize_params(sens=1, tgt_x=2, tgt_y=3)")
    write(tmp_path, {"script.py": script})
    done, lines = same_as_plain(tmp_path, "script.py")
    assert done.returncode == 0
    expected = {
        "svd, its parameters are (mat, rank), published (mat, r)",
        "resize_params, its parameters are (*params, sens, tgt_x, tgt_y), "
        "published (params, sens, tgt_x, tgt_y)",
        "sum_submatrix, an object of type, not a function",
        "compute_summed_area_table, an object of int, not a function",
        "max_sens_submatrix, a generator or a coroutine",
        "select_top_k_layers, a generator or a coroutine",
        "calculate_sensitivity, its parameters are (*args), "
        "published (model, tokenizer, data, device, loss_on_output)",
        "KnowledgeNeurons.knowledge_injection, its parameters are "
        "(self, teacher_weights, student_weights, quiet), published (self, teacher_weights, "
        "student_weights, ffn_layers, attn_layers, ffn_neurons, ffn_module, attn_neurons, "
        "attn_module)",
        "Knowledge_translator, without a published method of its own",
    }
    assert set(lines[:-1]) == {f"left alone: __main__.{line}" for line in expected}
    assert lines[-1] == "nothing was recognised: the script ran as it is"


def test_names_that_are_not_the_modules_own_are_nobodys(tmp_path):
    script = """
        class Holder:
            def svd(self, mat, r):
                return 1

        def outer():
            def svd(mat, r):
                return 2
            return svd

        print(Holder().svd(1, 2), outer()(1, 2))
        if __name__ == "__main__":
            print("working")
    """
    write(tmp_path, {"script.py": script})
    _, lines = same_as_plain(tmp_path, "script.py")
    assert lines == ["nothing recognised so far: the script runs as it is"]


def test_definitions_may_go_on_inside_the_guard(tmp_path):
    script = """
        if __name__ == "__main__":
            def svd(mat, r):
                return 1

            print("working")
    """
    write(tmp_path, {"script.py": script, "other.py": script.replace("mat, r", "mat, rank")})
    assert same_as_plain(tmp_path, "script.py")[1] == ["replaced: __main__.svd"]
    assert same_as_plain(tmp_path, "other.py")[1] == [
        "left alone: __main__.svd, its parameters are (mat, rank), published (mat, r)",
        "nothing was recognised: the script ran as it is",
    ]


PACKAGE = {
    "knowledge_neurons/__init__.py": "from .knowledge_neurons import KnowledgeNeurons\n",
    "knowledge_neurons/knowledge_neurons.py": """
        import functools
        from .tools import *

        class KnowledgeNeurons:
            def __init__(self, model):
                self.model = model

            @cleaned(debug=True)
            def get_top_attribute_layers(self, prompts, ground_truths, top_cnt=2):
                return "own layers"
    """,
    "knowledge_neurons/tools.py": """
        import functools

        def cleaned(debug):
            def decorator(function):
                @functools.wraps(function)
                def wrapper(*args, **kwargs):
                    return function(*args, **kwargs)
                return wrapper
            return decorator
    """,
    "late.py": "def svd(mat, r):\n    return 1\n",
    "early.py": "def resize(params):\n    return svd\nif __name__ == '__main__':\n    resize(1)\n",
    "site-packages/installed.py": "def svd(mat, r):\n    return 1\n",
}


def test_modules_of_the_script_are_replaced_as_they_are_imported(tmp_path):
    script = """
        import importlib
        import pickle
        import sys
        import early
        from knowledge_neurons import KnowledgeNeurons

        def ours(function):
            return hasattr(function, "_pkt_ext_fix")

        class Row:
            pass

        def main():
            import late
            from late import svd
            print(ours(KnowledgeNeurons.get_top_attribute_layers), ours(svd))
            print(ours(importlib.reload(late).svd), late.svd is svd)
            sys.path.append("site-packages")
            import installed
            print(ours(installed.svd))
            row = pickle.loads(pickle.dumps([Row(), Row, main, svd_here]))
            print(type(row[0]) is Row, row[1] is Row, row[2] is main, row[3] is svd_here)

        def svd(mat, r):
            return 1

        svd_here = svd
        if __name__ == "__main__":
            main()
    """
    write(tmp_path, PACKAGE | {"script.py": script})
    done, lines = compat(tmp_path, "script.py")
    assert done.stdout.splitlines() == [
        "True True",
        "True False",
        "False",
        "True True True True",
    ]
    assert lines == [
        "replaced: knowledge_neurons.knowledge_neurons.KnowledgeNeurons.get_top_attribute_layers",
        "replaced: __main__.svd",
        "replaced: late.svd",
        "replaced: late.svd",
    ]
    assert done.stderr == ""


def test_worker_processes_find_the_script_as_it_is(tmp_path):
    script = """
        import multiprocessing

        def svd(mat, r):
            return 1

        def own(x):
            return x + 1, hasattr(svd, "_pkt_ext_fix")

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(own, [1, 2]))
    """
    write(tmp_path, {"script.py": script})
    done, lines = same_as_plain(tmp_path, "script.py")
    assert done.stdout == "[(2, False), (3, False)]\n" and lines == ["replaced: __main__.svd"]


def test_of_several_processes_the_first_speaks(tmp_path, monkeypatch):
    write(tmp_path, {"script.py": "def svd(mat, r):\n    return 1\n"})
    monkeypatch.setenv("RANK", "1")
    assert compat(tmp_path, "script.py")[1] == []
    monkeypatch.setenv("RANK", "0")
    assert compat(tmp_path, "script.py")[1] == ["replaced: __main__.svd"]


def test_a_script_that_needs_an_old_peft_is_told_what_replaces_it(tmp_path):
    script = "from peft import get_peft_model, prepare_model_for_int8_training\n"
    write(tmp_path, {"finetune.py": script, "peft.py": "get_peft_model = None\n"})
    done, lines = same_as_plain(tmp_path, "finetune.py")
    assert done.returncode == 1
    assert "`pkt finetune` replaces this script, see docs/migrating.md" in lines


def test_recognising_loads_no_torch():
    code = "import sys, pkt_ext.compat.running\nassert not {'torch', 'numpy'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True)
