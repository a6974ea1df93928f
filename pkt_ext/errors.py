# SPDX-License-Identifier: Apache-2.0
"""Errors that end a command with one line and a documented exit code."""


class PktError(Exception):
    """A failure the user can act on; `exit_code` is what `pkt` exits with."""

    exit_code = 1


class InputError(PktError, ValueError):
    """Bad input: a missing file, a wrong shape, vocabularies that differ. Exit code 2."""

    exit_code = 2


class NonFiniteError(InputError):
    """NaN or infinity where the numbers of one sample, or of all together, went.

    Attributes:
        sample: the id of the only one to blame; None where it is a parameter, or nobody alone.
    """

    def __init__(self, message: str, sample: str | None = None):
        super().__init__(message)
        self.sample = sample


class OutputBusyError(PktError):
    """Another process is writing the same output. Exit code 73."""

    exit_code = 73


class ResourceError(PktError):
    """Out of disk or memory; finished work is kept. Exit code 75."""

    exit_code = 75
