"""``chopgrad plan`` and ``chopgrad audit``. Arguments are read first: a wrong one need not wait for PyTorch."""

from __future__ import annotations

import argparse
import sys

from chopgrad import arguments
from chopgrad.units import bytes_of


def main(words: list[str] | None = None) -> int:
    options = _parser().parse_args(words)
    try:
        arguments.size_of(options.size, "64x64" if options.command == "audit" else "720x1280")
        if options.command == "plan":
            bytes_of("--budget", options.budget)
            bytes_of("--host-budget", options.host_budget)
            arguments.rates_of(options.rates)
            arguments.check_encoder(options)
            arguments.check_vae(options.vae)
            if options.frames < 1 and not options.encoder:
                raise ValueError(f"frames must be at least 1, got {options.frames}.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.command == "audit":
        from chopgrad import audit_command

        return audit_command.run(options)
    if sys.stderr.isatty():
        print("\r\x1b[Kreading the architecture ...", end="", file=sys.stderr, flush=True)
    from chopgrad import plan_command

    return plan_command.run(options)


def _parser() -> argparse.ArgumentParser:
    return arguments.parser()


if __name__ == "__main__":
    sys.exit(main())
