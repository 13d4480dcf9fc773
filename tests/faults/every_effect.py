"""Kill a whole operation at every effect it has on the file system, and resume it.

    python -m tests.faults.every_effect (upcycle|merge) SOURCE FOLDER [STATISTICS]

A process of its own: children are forked from it, so torch may be imported but must not have started threads.
Prints one JSON document; exits 1 at the first violation, naming the effect.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent
from tests.faults.harness import KILLED, digest, effects, in_child, no_waiting

OPTIONS: dict[str, dict[str, object]] = {
    "upcycle": {"method": "sparse", "options": {"experts": 2, "top_k": 1}},
    "merge": {"method": "m-smoe", "options": {"experts": 4}},
}


def main() -> None:
    command, source, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    statistics = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    asked = OPTIONS[command]

    def operation(output: Path, *, resume: bool = False, force: bool = False) -> None:
        request = Request(
            command,
            str(asked["method"]),
            (source,),
            output,
            asked["options"],  # type: ignore[arg-type]
            calibration=statistics,
            resume=resume,
            force=force,
            workers=1,
            max_shard_bytes=100_000,
        )
        run(request, Silent())

    # Imported here once, so that hundreds of children need not.
    import scipy.optimize
    import torch

    import moesurg.surgery.calibration.run
    import moesurg.surgery.linalg.permutation
    import moesurg.surgery.linalg.svd

    assert scipy.optimize
    assert moesurg.surgery.linalg.permutation
    torch.set_num_threads(1)
    expected_at = folder / "expected"
    with no_waiting():
        if in_child(lambda: operation(expected_at)) != 0:
            fail("the uninterrupted run failed")
        expected = digest(expected_at)
        # Counted in a child as well, so that this process stays as it is.
        counted = folder / "effects.json"

        def count() -> None:
            seen = effects(lambda: operation(folder / "counted"))
            counted.write_text(json.dumps([[effect, path.name] for effect, path in seen]))

        if in_child(count) != 0:
            fail("the counted run failed")
        seen = json.loads(counted.read_text())
        for replaced in (False, True):
            for k, effect in enumerate(seen):
                kill_and_resume(operation, folder / "out", k, effect, expected, replaced)
    print(json.dumps({"effects": len(seen), "files": len(list(expected_at.iterdir()))}))


def kill_and_resume(
    operation: object, output: Path, k: int, effect: list[str], expected: str | None, replaced: bool
) -> None:
    """One kill point: the output is absent, old or complete, and a resume completes it."""
    run_it: object = operation
    for leftover in output.parent.glob("out*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    old = None
    if replaced:
        output.mkdir()
        (output / "old.txt").write_text("old")
        old = digest(output)
    code = in_child(lambda: run_it(output, force=replaced), kill_at=k)  # type: ignore[operator]
    where = f"effect {k} ({effect[0]} {effect[1]}), replacing: {replaced}"
    if code not in (KILLED, 0):
        fail(f"{where}: exit code {code}")
    if digest(output) not in (old, expected):
        fail(f"{where}: the output is neither absent, old nor complete")
    if in_child(lambda: run_it(output, resume=True, force=replaced)) != 0:  # type: ignore[operator]
        fail(f"{where}: the resume failed")
    if digest(output) != expected:
        fail(f"{where}: the resumed run wrote other bytes")
    left = sorted(path.name for path in output.parent.glob("out*") if path != output)
    if left:
        fail(f"{where}: left behind {left}")


def fail(sentence: str) -> None:
    print(sentence)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
