import os

import pytest

from moray.cluster.network import interface_of, is_loopback, own_address_towards, use_interface_of


def test_the_address_that_leads_to_a_host() -> None:
    assert own_address_towards("127.0.0.1") == "127.0.0.1"
    assert is_loopback(own_address_towards("localhost"))
    assert is_loopback("127.0.1.1")
    assert is_loopback("::1")
    assert not is_loopback("10.78.0.1")


def test_gloo_is_told_the_interface_unless_somebody_else_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    use_interface_of("192.0.2.1")  # kept for documentation: no machine has it
    assert interface_of("192.0.2.1") is None
    assert os.environ == {}
    use_interface_of("127.0.0.1")
    assert os.environ == {"GLOO_SOCKET_IFNAME": "lo"}
    os.environ["GLOO_SOCKET_IFNAME"] = "eth7"
    use_interface_of("127.0.0.1")
    assert os.environ == {"GLOO_SOCKET_IFNAME": "eth7"}
