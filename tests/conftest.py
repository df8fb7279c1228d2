"""Settings for the whole suite."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton; nothing else reads it

from hypothesis import HealthCheck, settings  # noqa: E402

import kernels  # noqa: E402
from minipaged import cache_folder  # noqa: E402
from minipaged.models import ModelError  # noqa: E402
from minipaged.models.fetch import fetch_smollm2  # noqa: E402
from tests.browser import Tabs, chromium  # noqa: E402

# The same examples on every run: a failure in CI is a failure here. HYPOTHESIS_PROFILE=explore draws new ones.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("suite", derandomize=True, **common)
settings.register_profile("explore", max_examples=2000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

pytest.register_assert_rewrite("tests.viewed")  # its assertions say what differs, as a test's own

# The tensors here are too small to share out (20 times slower on two busy cores); pytest-xdist has a worker a core.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--schedules", type=int, default=2000, help="random schedules on the recall model (2000)")
    parser.addoption("--all-cells", action="store_true", help="run every cell of a chapter again, slow ones too")
    parser.addoption("--sanitize", action="store_true", help="build C++ with sanitizers (LD_PRELOAD must hold libasan)")
    parser.addoption("--transfer-examples", type=int, default=25, help="times that one of two engines is killed (25)")
    parser.addoption("--server-examples", type=int, default=15, help="bodies for each route of the server (15)")
    parser.addoption("--rank-examples", type=int, default=6, help="kills and stops of processes at random moments (6)")
    parser.addoption("--router-examples", type=int, default=1, help="times that a server is killed below a router (1)")


def pytest_configure(config):
    """xdist begins with the groups that have most tests, but a chapter takes a minute for five: our order counts."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture(scope="module")
def browser():
    """Who asks for it is skipped where there is none."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def tabs(browser):
    """Opens tabs. At the end: nothing went wrong in any of them, and none asked anybody but its own page."""
    tabs = Tabs(browser)
    yield tabs
    tabs.close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    """What each worker would fetch or build for itself, if it isn't there yet, is there before they begin."""
    try:
        fetch_smollm2()
        kernels.load("cpp", folder=cache_folder())
    except (ModelError, kernels.Unavailable):
        pass  # the tests that need it say so


def pytest_collection_modifyitems(config, items):
    """The tests of a file run on one worker, which builds once what they share; so do those of a chapter or assignment.

    For workers what takes long is first, so that none ends with a long one while another has nothing left.
    """
    groups = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        chapter = params.get("chapter")
        number = params.get("number", "") if item.path.name == "test_course_solutions.py" else ""
        name = chapter.name if chapter else f"{item.path.name}{number}"
        item.add_marker(pytest.mark.xdist_group(name))
        groups.setdefault((not chapter, name), []).append(item)
    if hasattr(config, "workerinput"):
        order = sorted(groups, key=lambda group: (group[0], -len(groups[group])))  # chapters, then by number
        items[:] = [item for group in order for item in groups[group]]
