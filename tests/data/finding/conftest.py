"""Folders of empty files: finding never opens a volume."""

import pytest


@pytest.fixture
def tree(tmp_path):
    """`tree(*names)`: empty files below one folder, which is returned."""

    def make(*names, root="data"):
        folder = tmp_path / root
        folder.mkdir(exist_ok=True)
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return folder

    return make
