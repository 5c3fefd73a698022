"""`result.json` as plain data, for tests that look into it or change it."""

import json

from lightning_topkast.app.run_folder import result


def read_result(folder):
    """What the application reads, as it was written."""
    return result.read_result(folder).model_dump(exclude_unset=True)


def write_result(folder, content):
    """Write anything, also what the application would not."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(content))
