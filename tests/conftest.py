"""For all tests: no network beyond this machine, no window for figures, real data only where a variable names it."""
import os
import socket
from pathlib import Path

import pytest

# Also for the programs that tests start: a request to anywhere else fails at once instead of working on some machines.
NOWHERE = "http://127.0.0.1:9"
os.environ.update(http_proxy=NOWHERE, https_proxy=NOWHERE, HTTP_PROXY=NOWHERE, HTTPS_PROXY=NOWHERE,
                  no_proxy="127.0.0.1,localhost", NO_PROXY="127.0.0.1,localhost", MPLBACKEND="Agg")


@pytest.fixture(autouse=True, scope="session")
def offline():
    connect = socket.socket.connect

    def local_only(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    socket.socket.connect = local_only
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="session")
def mnist_root():
    """The folder with MNIST/raw."""
    if not os.environ.get("MNIST_ROOT"):
        pytest.skip("needs the real MNIST: set MNIST_ROOT to the folder that holds MNIST/raw")
    return Path(os.environ["MNIST_ROOT"]).resolve()
