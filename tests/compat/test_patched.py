# SPDX-License-Identifier: Apache-2.0
"""`patched`: published functions and classes replaced in a module and put back."""

import functools
import inspect
import sys
import textwrap
import warnings
from types import ModuleType, SimpleNamespace

import pytest

from pkt_ext.compat import PublishedBehaviour, patched, recognition


def module(source: str, name: str = "published", **namespace) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(namespace)
    exec(textwrap.dedent(source), vars(made))
    return made


class Refused(Exception):
    """Stands for our NotSupported."""


@pytest.fixture
def ours(monkeypatch, told_nothing) -> list:
    """Doubles in the place of our modules, which report how they are called."""
    calls = []

    def double(name):
        def function(*args, **extras):
            calls.append((name, args, extras))
            if name == "calculate_sensitivity" and args[0] == "strange":
                raise Refused("a strange model")
            return None if name == "__init__" else f"our {name}"

        return function

    functions = {name: double(name) for name in recognition.FUNCTIONS}
    classes = {
        name: type(name, (), {method: double(method) for method in ("__init__", *methods)})
        for name, methods in recognition.METHODS.items()
    }
    package = "pkt_ext.compat"
    functions = SimpleNamespace(**functions, NotSupported=Refused)
    monkeypatch.setitem(sys.modules, f"{package}.paraknowtransfer", functions)
    monkeypatch.setitem(
        sys.modules, f"{package}.neural_incompatibility", SimpleNamespace(**classes)
    )
    return calls


SEEKING = """
    LORA_PARA = {"7b": {"n_layer": 32}}

    def calculate_sensitivity(model, tokenizer, data, device="cpu", loss_on_output=True):
        return "own", model, tokenizer, data, device, loss_on_output

    def select_top_k_layers(sensitivity, args):
        return "own layers"

    def svd(mat, r=8):
        return "own svd"

    def main():
        return svd(1)
"""
CLASSES = """
    class KnowledgeNeurons:
        def __init__(self, model, tokenizer, model_type="llama", device="cuda:0",
                     is_teacher=False, FFN_MODUELS=None, ATTN_MODUELS=None):
            self.model = model

        def get_top_attribute_layers(self, prompts, ground_truths, top_cnt=2):
            return "own layers"

        def knowledge_injection(self, teacher_weights, student_weights, requires_grad=True):
            return "own injection"

    class Knowledge_translator:
        def forward(self, x, source_idxs):
            return "own forward"
"""


def test_ours_are_called_with_the_scripts_own_defaults_and_tables(ours):
    script = module(SEEKING)
    with patched(script) as replaced:
        assert script.main() == "our svd"
        assert script.svd(r=3, mat=2) == "our svd"
        script.calculate_sensitivity("model", "tokenizer", data="row", loss_on_output=False)
        script.select_top_k_layers("scores", "args")
        script.LORA_PARA = "rebound"
        script.select_top_k_layers("scores", "args")
    assert replaced == [
        f"published.{name}" for name in ("calculate_sensitivity", "select_top_k_layers", "svd")
    ]
    tables = [{"7b": {"n_layer": 32}}, "rebound"]
    assert ours == [
        ("svd", (1, 8), {"fix": False}),
        ("svd", (2, 3), {"fix": False}),
        (
            "calculate_sensitivity",
            ("model", "tokenizer", "row", "cpu", False),
            {"fix": False, "defer": True, "namespace": vars(script)},
        ),
        *[
            ("select_top_k_layers", ("scores", "args"), {"sizes": table, "fix": False})
            for table in tables
        ],
    ]
    assert script.main() == "own svd"


def test_wrong_arguments_give_the_scripts_own_error(ours):
    script = module(SEEKING)
    for wrong in ((), (1, 2, 3)):
        with pytest.raises(TypeError) as own:
            script.svd(*wrong)
        with patched(script), pytest.raises(TypeError) as error:
            script.svd(*wrong)
        assert str(error.value) == str(own.value)
        assert error.value.__context__ is None
    assert ours == []


def test_a_model_that_ours_refuses_is_scored_by_the_script(ours):
    script = module(SEEKING)
    with patched(script):
        with pytest.warns(PublishedBehaviour, match="own calculate_sensitivity.*a strange model"):
            result = script.calculate_sensitivity("strange", 1, 2)
        assert result == ("own", "strange", 1, 2, "cpu", True)
        with warnings.catch_warnings(action="error"):
            script.calculate_sensitivity("strange", 1, 2)  # said once
        assert script.calculate_sensitivity("plain", 1, 2) == "our calculate_sensitivity"


def test_a_table_of_another_name_is_the_scripts_to_read(ours):
    script = module(SEEKING.replace("LORA_PARA", "QWEN_PARA"))
    with patched(script):
        with pytest.warns(PublishedBehaviour, match="own select_top_k_layers is used.*LORA_PARA"):
            assert script.select_top_k_layers("scores", args="args") == "own layers"
        with warnings.catch_warnings(action="error"):
            script.select_top_k_layers("scores", "args")  # said once
    assert ours == []


WINDOWS = """
    def compute_summed_area_table(matrix):
        return "own table"

    def sum_submatrix(sum_area_table, top_left, bottom_right):
        return "own sum"

    def max_sens_submatrix(sens, tgt_x, tgt_y):
        return "own window, " + compute_summed_area_table(sens)

    def resize_params(params, sens, tgt_x, tgt_y):
        return "own resize, " + max_sens_submatrix(sens, tgt_x, tgt_y)
"""


def resized(script) -> str:
    return script.resize_params(1, 2, 3, 4)


def test_a_function_that_calls_one_of_another_signature_is_the_scripts_own(ours):
    script = module(WINDOWS.replace("sens, tgt_x, tgt_y):", "sens, tgt_x, tgt_y, sign=-1):", 1))
    with patched(script) as replaced:
        with pytest.warns(
            PublishedBehaviour, match="own resize_params is used.*calls a max_sens_submatrix"
        ):
            assert resized(script) == "own resize, own window, our compute_summed_area_table"
        with warnings.catch_warnings(action="error"):
            resized(script)  # said once
    assert "published.resize_params" in replaced and "published.max_sens_submatrix" not in replaced


def test_what_is_called_by_what_is_called_counts_too(ours):
    script = module(WINDOWS.replace("(matrix)", "(matrix, axis=0)"))
    with patched(script), warnings.catch_warnings(action="ignore"):
        assert script.max_sens_submatrix(2, 3, 4) == "own window, own table"
        assert resized(script) == "own resize, own window, own table"


def test_a_function_rebound_while_replaced_is_the_one_called(ours):
    script = module(WINDOWS)
    user = module("def shifted(sens, tgt_x, tgt_y):\n    return 'shifted window'\n", "user")
    with patched(script), warnings.catch_warnings(action="ignore"):
        assert resized(script) == "our resize_params"
        found = script.max_sens_submatrix
        script.max_sens_submatrix = user.shifted
        assert resized(script) == "own resize, shifted window"
        script.max_sens_submatrix = functools.wraps(found)(lambda *args: "wrapped window")
        assert resized(script) == "own resize, wrapped window"


def test_what_an_imported_function_calls_may_stay_as_published(ours):
    script = module(WINDOWS)
    user = module("", "user", resize_params=script.resize_params)
    with patched(user), warnings.catch_warnings(action="error"):
        assert resized(user) == "our resize_params"
        script.max_sens_submatrix = lambda sens, *size: "other window"
        with pytest.raises(PublishedBehaviour, match="calls a max_sens_submatrix"):
            resized(user)


def test_a_function_is_replaced_without_its_decorators_and_that_is_said(ours, capsys):
    script = module("""
        import functools

        def scaled(function):
            @functools.wraps(function)
            def wrapper(*args):
                return "scaled " + function(*args)
            return wrapper

        @scaled
        def svd(mat, r):
            return "svd"

        def resize_params(params, sens, tgt_x, tgt_y):
            return "resized"
    """)
    with patched(script):
        assert script.svd(1, 2) == "our svd"
    assert capsys.readouterr().err == (
        "pkt_ext.compat: replaced: published.svd, without its decorators\n"
    )
    assert script.svd(1, 2) == "scaled svd"


def test_classes_are_changed_in_place_and_put_back(ours, capsys):
    script = module(CLASSES)
    user = module("", "user", KnowledgeNeurons=script.KnowledgeNeurons)
    before = [dict(vars(cls)) for cls in (script.KnowledgeNeurons, script.Knowledge_translator)]
    neurons = script.KnowledgeNeurons("model", "tokenizer")
    with patched(script) as replaced:
        assert user.KnowledgeNeurons.get_top_attribute_layers(neurons, 1, ground_truths=2)
        assert neurons.knowledge_injection(1, 2) == "own injection"
        assert script.Knowledge_translator().forward(1, source_idxs=2) == "our forward"
        assert script.KnowledgeNeurons("model", "tokenizer").model == "model"
        assert not hasattr(neurons, "fix")
    assert replaced == [
        "published.KnowledgeNeurons.get_top_attribute_layers",
        "published.Knowledge_translator.forward",
    ]
    assert [name for name, _, _ in ours] == ["get_top_attribute_layers", "forward"]
    assert ours[0][1:] == ((neurons, 1, 2, 2), {})
    assert "left alone: published.KnowledgeNeurons.knowledge_injection" in capsys.readouterr().err
    after = [dict(vars(cls)) for cls in (script.KnowledgeNeurons, script.Knowledge_translator)]
    assert after == before


def test_fix_reaches_functions_and_classes(ours):
    script = module(SEEKING + CLASSES)
    before = dict(vars(script.KnowledgeNeurons))
    with patched(script, fix=True) as replaced:
        script.svd(1)
        neurons = script.KnowledgeNeurons("model", "tokenizer", "qwen")
        assert neurons.fix and script.Knowledge_translator.fix
    assert "published.KnowledgeNeurons.__init__" in replaced
    assert ours[0] == ("svd", (1, 8), {"fix": True})
    assert ours[1][:2] == (
        "__init__",
        (neurons, "model", "tokenizer", "qwen", "cuda:0", False, None, None),
    )
    assert dict(vars(script.KnowledgeNeurons)) == before
    assert not hasattr(script.Knowledge_translator, "fix")


def test_a_class_without_anything_recognised_gets_no_fix(ours):
    script = module("""
        class KnowledgeNeurons:
            def knowledge_injection(self, deltas):
                return "own injection"
    """)
    with pytest.warns(UserWarning, match="recognised nothing"), patched(script, fix=True):
        assert not hasattr(script.KnowledgeNeurons, "fix")


def test_patched_twice_changes_nothing_more_and_restores_in_turn(ours):
    script = module(SEEKING + CLASSES)
    own = dict(vars(script))
    with patched(script):
        outer = script.svd
        with patched(script) as again:
            assert script.svd is outer and again == []
        assert script.svd is outer
        with patched(script, fix=True):
            script.svd(1)
            assert script.KnowledgeNeurons.fix
            with patched(script):
                assert not script.KnowledgeNeurons.fix
        assert script.svd is outer
        script.svd(1)
    assert [extras["fix"] for _, _, extras in ours] == [True, False]
    assert vars(script) == own


def test_patched_restores_after_an_error(ours):
    from transformers import PreTrainedModel

    script = module(SEEKING + CLASSES)
    own = dict(vars(script)), dict(vars(script.KnowledgeNeurons))
    loader = vars(PreTrainedModel)["from_pretrained"]
    with pytest.raises(KeyError), patched(script):
        raise KeyError
    assert (dict(vars(script)), dict(vars(script.KnowledgeNeurons))) == own
    assert vars(PreTrainedModel)["from_pretrained"] is loader


def test_names_imported_from_elsewhere_are_replaced_where_they_are_published(ours, capsys):
    script = module(SEEKING)
    namespace = dict(svd=script.svd, resize_params=textwrap.dedent, sum_submatrix=len)
    user = module("def main():\n    return svd(1)\n", "user", **namespace)
    with patched(user) as replaced:
        assert user.main() == "our svd" and script.main() == "own svd"
    assert replaced == ["user.svd"]
    assert capsys.readouterr().err == ""


def test_values_that_look_like_anything_are_left_alone(ours, capsys):
    script = module("""
        import functools
        from unittest.mock import MagicMock

        svd = MagicMock()
        resize_params = functools.partial(print)

        def sum_submatrix(sum_area_table, top_left, bottom_right):
            pass

        sum_submatrix.__wrapped__ = sum_submatrix

        @functools.wraps(resize_params)
        def max_sens_submatrix(sens, tgt_x, tgt_y):
            pass

        class Answering:
            def __getattr__(self, name):
                raise KeyError(name)

        select_top_k_layers = KnowledgeNeurons = Answering()

        class Knowledge_translator:
            forward = staticmethod(svd)
    """)
    before = dict(vars(script))
    with pytest.warns(UserWarning, match="recognised nothing"), patched(script) as replaced:
        assert dict(vars(script)) == before and replaced == []
    said = capsys.readouterr().err
    assert (
        "left alone: published.select_top_k_layers, an object of Answering, not a function" in said
    )
    assert "sum_submatrix, a function whose decorators hide its parameters" in said


def test_a_module_without_anything_published_is_warned_about(ours):
    with pytest.warns(UserWarning, match="recognised nothing in user") as caught:
        with patched(module("def svd(mat, rank):\n    pass\n", "user")) as replaced:
            assert replaced == []
    assert caught[0].filename == __file__


# --- ours, as they are ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", recognition.FUNCTIONS)
def test_our_functions_take_what_is_published(name):
    ours = getattr(recognition.our_functions(), name)
    parameters = inspect.signature(ours).parameters
    extras = {extra for extra, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert tuple(p for p in parameters if p not in extras) == recognition.FUNCTIONS[name]
    assert ("fix" in extras) == (name not in recognition.NOTHING_TO_FIX)
    assert ("sizes" in extras) == (name == "select_top_k_layers")
    assert ({"defer", "namespace"} <= extras) == (name == "calculate_sensitivity")


METHODS_OF_OURS = [
    (cls, name, parameters)
    for table in (recognition.METHODS, recognition.CONSTRUCTORS)
    for cls, methods in table.items()
    for name, parameters in methods.items()
]


@pytest.mark.parametrize(("cls", "name", "parameters"), METHODS_OF_OURS)
def test_our_methods_take_what_is_published(cls, name, parameters):
    found = inspect.signature(recognition.our_method(cls, name)).parameters.values()
    assert tuple(p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD) == parameters
    assert {p.name for p in found if p.kind is not p.POSITIONAL_OR_KEYWORD} <= {"fix"}
