# SPDX-License-Identifier: Apache-2.0
"""Puts our functions in the place of published ones, and the published ones back."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

from pkt_ext.compat import notices
from pkt_ext.compat.loading import float32_by_default
from pkt_ext.compat.recognition import (
    CALLED,
    CONSTRUCTORS,
    FUNCTIONS,
    METHODS,
    NAMES,
    NOTHING_TO_FIX,
    difference,
    our_functions,
    our_method,
)

_MARK = "_pkt_ext_fix"  # on a function of ours: the `fix` that it was made with


class Replacer:
    """Replaces what it recognises, one definition at a time.

    A replaced function is replaced with its decorators, of which nothing runs any more. That is
    said of functions; the published methods have decorators themselves, which free memory.

    Args:
        fix:      make functions of ours that correct what the published code gets wrong.
        announce: say of everything that it was replaced, not only of functions with decorators.

    Attributes:
        replaced:   "module.name" of everything replaced, in order.
        recognised: whether anything was: replaced now, or ours already.
    """

    def __init__(self, *, fix: bool, announce: bool = False):
        self.fix = fix
        self._announce = announce
        self.replaced: list[str] = []
        self.recognised = False
        self._undo = ExitStack()

    def restore(self) -> None:
        """Put everything back, the last replaced first."""
        self._undo.close()

    def look_at(self, namespace: dict, name: str, *, quiet: bool = False) -> None:
        """Replace what a module's namespace has under a published name, if it is recognised.

        A class is changed in place, method by method: whoever has imported it sees that.

        Args:
            namespace: the module's dictionary.
            name:      one of `recognition.NAMES`.
            quiet:     say nothing of what bears the name but is not recognised.
        """
        value = namespace[name]
        label = f"{namespace['__name__']}.{name}"
        if name in FUNCTIONS:
            put = functools.partial(namespace.__setitem__, name)
            make = functools.partial(_function_of_ours, name, self.fix)
            self.recognised |= self._replace(
                label, value, FUNCTIONS[name], make, put, quiet=quiet, tell_decorators=True
            )
        elif isinstance(value, type) and not METHODS[name].keys().isdisjoint(vars(value)):
            self.recognised |= self._look_into(value, name, label)
        elif not quiet:
            notices.say(f"left alone: {label}, without a published method of its own")

    def _look_into(self, cls: type, name: str, label: str) -> bool:
        """Replace a class's methods; whether any is ours now."""
        methods = METHODS[name]
        if self.fix:
            methods = methods | CONSTRUCTORS.get(name, {})
        recognised = False
        for method in [method for method in methods if method in vars(cls)]:
            put = functools.partial(setattr, cls, method)
            make = functools.partial(_method_of_ours, name, method)
            value, parameters = vars(cls)[method], methods[method]
            recognised |= self._replace(f"{label}.{method}", value, parameters, make, put)
        if recognised and getattr(cls, "fix", False) != self.fix:  # what our methods read
            undo = (setattr, cls, "fix", cls.fix) if "fix" in vars(cls) else (delattr, cls, "fix")
            self._undo.callback(*undo)
            cls.fix = self.fix
        return recognised

    def _replace(
        self,
        label: str,
        value: object,
        parameters: tuple[str, ...],
        make: Callable[[Callable], Callable],
        put: Callable[[object], None],
        *,
        quiet: bool = False,
        tell_decorators: bool = False,
    ) -> bool:
        """Put what `make` makes of a published function in its place; whether it is ours now."""
        made_with = vars(value).get(_MARK) if inspect.isfunction(value) else None
        if made_with == self.fix:
            return True
        original = value if made_with is None else value.__wrapped__
        reason = difference(original, parameters)
        if reason is not None:
            if not quiet:
                notices.say(f"left alone: {label}, {reason}")
            return False
        replacement = _called_like(original, make(original))
        setattr(replacement, _MARK, self.fix)
        self._undo.callback(put, value)
        put(replacement)
        self.replaced.append(label)
        decorated = tell_decorators and hasattr(original, "__wrapped__")
        if decorated or self._announce:
            notices.say(f"replaced: {label}" + ", without its decorators" * decorated)
        return True


@contextmanager
def patched(module: ModuleType, *, fix: bool = False) -> Iterator[list[str]]:
    """While active, the published functions that `module` defines or has imported are ours.

    Functions are replaced in the module, classes changed in place. `from_pretrained` without a
    dtype gives float32, as it did before transformers 5. All is put back at the end. A line on
    stderr names a function whose decorators are passed by.

    Args:
        module: such as an imported `extract_lora_with_sensitivity`.
        fix:    correct what the published code gets wrong, see docs/migrating.md.

    Yields:
        What was replaced, as "module.name".

    Warns:
        UserWarning: nothing in the module was recognised.
    """
    replacer = Replacer(fix=fix)
    namespace = vars(module)
    try:
        for name in [name for name in namespace if name in NAMES]:
            home = getattr(namespace[name], "__module__", module.__name__)
            replacer.look_at(namespace, name, quiet=home != module.__name__)
        if not replacer.recognised:
            message = f"pkt_ext.compat recognised nothing in {module.__name__}; it is unchanged"
            warnings.warn(message, stacklevel=3)
        with float32_by_default():
            yield replacer.replaced
    finally:
        replacer.restore()


def _called_like(original: Callable, ours: Callable) -> Callable:
    """`ours`, called as `original` is: with its defaults, and its errors for wrong arguments."""
    signature = inspect.signature(original)
    count = len(signature.parameters)

    @functools.wraps(original)
    def replacement(*args, **kwargs):
        if kwargs or len(args) != count:  # else nothing to bind, which would slow long loops
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                bound = None
            if bound is None:
                return original(*args, **kwargs)
            bound.apply_defaults()
            args = bound.args
        return ours(*args)

    return replacement


def _function_of_ours(name: str, fix: bool, original: Callable) -> Callable:
    """Our function for the published arguments in order; its module loads with the first call."""
    namespace = inspect.unwrap(original).__globals__  # looked into when called: names are rebound

    def own(reason, *args):
        notices.once(f"own {name}", f"the script's own {name} is used: {reason}")
        return original(*args)

    if name == "select_top_k_layers":

        def ours(sensitivity, args):
            table = namespace.get("LORA_PARA")
            if table is None:
                return own("its module has no LORA_PARA", sensitivity, args)
            return our_functions().select_top_k_layers(sensitivity, args, sizes=table, fix=fix)

    elif name == "calculate_sensitivity":

        def ours(*args):
            module = our_functions()
            try:
                return module.calculate_sensitivity(*args, fix=fix, defer=True, namespace=namespace)
            except module.NotSupported as error:
                reason = str(error)
            return own(reason, *args)

    elif name in CALLED:

        def ours(*args):
            for called in CALLED[name]:
                if _is_another(called, name, namespace):
                    return own(f"it calls a {called} that is not the published one", *args)
            return getattr(our_functions(), name)(*args, fix=fix)

    elif name in NOTHING_TO_FIX:

        def ours(*args):
            return getattr(our_functions(), name)(*args)

    else:

        def ours(*args):
            return getattr(our_functions(), name)(*args, fix=fix)

    return ours


def _is_another(called: str, caller: str, namespace: dict) -> bool:
    """Whether the module that defines `caller` has something else under a published name.

    In a module whose functions were replaced that is all that is not ours. Where only who imported
    `caller` had it replaced, the published function is still there.
    """
    if called not in namespace or _is_ours(namespace[called]):
        return False
    return _is_ours(namespace.get(caller)) or (
        difference(namespace[called], FUNCTIONS[called]) is not None
    )


def _is_ours(value: object) -> bool:
    """Whether `value` was made here; its mark alone is copied by the decorators of others."""
    return inspect.isfunction(value) and value.__globals__ is globals()


def _method_of_ours(cls: str, name: str, original: Callable) -> Callable:
    return lambda *args: our_method(cls, name)(*args)
