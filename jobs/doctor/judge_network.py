"""Whether the nodes' clocks agree, and which of them are badly connected."""

from collections.abc import Iterator, Sequence
from statistics import median

from moray.jobs.doctor.facts import Facts
from moray.jobs.doctor.verdict import Level, Verdict, check, listed

CLOCK_S = 1.0
SLOW_PAIR = 0.5


def judge_clocks(nodes: Sequence[Facts]) -> list[Verdict]:
    """Of several nodes. Which of several workers failed first is found by their clocks."""
    ahead = {node.host: node.meeting.clock_s for node in nodes if node.meeting and node.meeting.clock_s is not None}
    if not ahead:
        return []
    # Most are right: rank 0 may be the one that is wrong.
    usual = median(ahead.values())
    off = {host: seconds - usual for host, seconds in ahead.items() if abs(seconds - usual) > CLOCK_S}
    findings: list[tuple[Level, str]] = [
        ("bad", f"{host}: {abs(by):.1f} s {'ahead of' if by > 0 else 'behind'} the others; start chrony or ntpd there")
        for host, by in off.items()
    ]
    return check("clocks", f"within {max(ahead.values()) - min(ahead.values()):.3f} s", findings)


def judge_network(nodes: Sequence[Facts]) -> list[Verdict]:
    """Of several nodes; rates are those of this measure, one worker a node."""
    meetings = [node.meeting for node in nodes if node.meeting]
    reduce = min((meeting.all_reduce for meeting in meetings if meeting.all_reduce), default=0.0)
    exchange = min((meeting.all_to_all for meeting in meetings if meeting.all_to_all), default=0.0)
    pairs = _pairs(nodes)
    usual = f", a pair {_rate(median(pairs.values()))}" if pairs else ""
    all_is_well = f"all-reduce {_rate(reduce)}, all-to-all {_rate(exchange)}{usual}"
    return check("network", all_is_well, _network(nodes, pairs))


def _network(nodes: Sequence[Facts], pairs: dict[tuple[int, int], float]) -> Iterator[tuple[Level, str]]:
    if absent := [node.host for node in nodes if not node.meeting]:
        yield "bad", f"{listed(absent)} did not come to measure it: look into the Ray worker logs there"
    problems = [f"{node.host}: {node.meeting.problem}" for node in nodes if node.meeting and node.meeting.problem]
    if problems:
        yield "bad", f"the nodes did not reach each other ({listed(problems)}); open all ports between them"
    if not pairs:
        return
    usual = median(pairs.values())
    slow = {pair: rate for pair, rate in pairs.items() if rate < SLOW_PAIR * usual}
    for rank, node in enumerate(nodes):
        own = [pair for pair in pairs if rank in pair]
        if len(own) > 1 and all(pair in slow for pair in own):
            rate = median(pairs[pair] for pair in own)
            yield "note", f"{node.host}: {_rate(rate)} to every other node, where {_rate(usual)} is usual: its link?"
            slow = {pair: rate for pair, rate in slow.items() if pair not in own}
    for (a, b), rate in slow.items():
        yield "note", f"{nodes[a].host} and {nodes[b].host}: {_rate(rate)}, where {_rate(usual)} is usual"


def _pairs(nodes: Sequence[Facts]) -> dict[tuple[int, int], float]:
    """Of each pair that was tried, the slower direction."""
    rates: dict[tuple[int, int], float] = {}
    for rank, node in enumerate(nodes):
        for peer, rate in node.meeting.pairs.items() if node.meeting else ():
            pair = (min(rank, peer), max(rank, peer))
            rates[pair] = min(rate, rates.get(pair, rate))
    return rates


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.3g} GB/s"
