"""What a recipe would ask of models, and what that costs, before any of it is spent.

Nothing is asked, connected to or written into the runs. What is not known is said, never guessed.
"""

import ipaddress
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from rich.box import SIMPLE_HEAD
from rich.table import Table

from preceptor.app import plan_training
from preceptor.app.console import Show
from preceptor.app.recipe import Recipe
from preceptor.app.rehearsal import Owed, rehearse
from preceptor.core.errors import UserError
from preceptor.core.money import Money, Price
from preceptor.core.records import Usage
from preceptor.llm.config import EndpointConfig
from preceptor.llm.zone import zone

_OLD = timedelta(days=183)
"""After which a price is doubted."""


def plan(recipe: Recipe, runs: Path, show: Show, card: float | None = None) -> None:
    """Show what each section that asks a teacher would ask and cost, and what each that trains would take.

    `card` is the memory of the GPU to train on, in GiB; by default it is this machine's device.

    Raises:
        UserError: no section asks a teacher or trains.
        WorkError: the ledger can't be read.
    """
    found = list(rehearse(recipe, runs, show))
    if not found and not plan_training.trainings(recipe):
        raise UserError(f"{recipe.path}: no section asks a teacher or trains; there is nothing to plan")
    if found:
        _show_asked(recipe, found, show)
    plan_training.plan(recipe, runs, show, card)


def _show_asked(recipe: Recipe, found: Sequence[Owed], show: Show) -> None:
    show.result(_table(recipe.name, found))
    told: dict[str, list[str]] = defaultdict(list)
    for owed in found:
        for line in _lines(owed):
            told[line].append(owed.section.name)
    for line, names in sorted(told.items(), key=lambda item: len(item[1]) > 1):  # what several share comes last
        show.result(f"{', '.join(names)}: {line}")
    for line in (*_sums(found), *_caps(found)):
        show.result(line)


def _table(name: str, found: Sequence[Owed]) -> Table:
    shown = Table(title=name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("section", overflow="fold")
    for column in ("requests", "at most", "tokens in", "at most", "tokens out", "at most"):
        shown.add_column(column, justify="right", no_wrap=True)
    for owed in found:
        shown.add_row(owed.section.name, *(_cells(owed) if owed.is_known else "?" * 6))
    return shown


def _cells(owed: Owed) -> Iterator[str]:
    least = "≥" if owed.open_ended and owed.requests else ""
    about = "~" if owed.counting.estimated and owed.requests else ""
    prompt, completion = _prompt(owed), _completion(owed)
    yield f"{least}{owed.requests:,}"
    yield "?" if least else f"{owed.requests_most:,}"
    yield f"{least or ('≥' if prompt is None else '')}{about}{owed.prompt if prompt is None else prompt:,}"
    yield "?" if least else f"{owed.prompt_most:,}"
    yield "?" if completion is None else f"{least}{completion:,}"
    yield "?" if least else f"{owed.completion_most:,}"


def _prompt(owed: Owed) -> int | None:
    """Tokens of the prompts, with the replies to come that they hold; None where their length is not known."""
    if owed.embedded and owed.lengths is None:
        return None
    return owed.prompt + (round(owed.embedded * owed.lengths.text) if owed.lengths else 0)


def _completion(owed: Owed) -> int | None:
    """Tokens of the replies; None where nothing is known of their length."""
    if not owed.requests:
        return 0
    return round(owed.requests * owed.lengths.completion) if owed.lengths else None


def _lines(owed: Owed) -> Iterator[str]:
    if owed.is_done:
        yield "done; it would ask nothing"
        return
    if owed.refused:
        yield (
            f"not known yet: {owed.refused}" if not owed.is_known else f"as it stands, a start refuses: {owed.refused}"
        )
    if not owed.is_known:
        return
    given = f"; the ledger gives {owed.replayed:,} replies for nothing" if owed.replayed else ""
    yield f"{owed.conversations:,} of {owed.total:,} conversations are owed{given}"
    if not owed.requests:
        return
    if owed.open_ended:
        yield "the strategy is your own: first requests are counted, more may follow"
    how = f"tokens by {owed.counting.told}"
    if owed.counting.estimated:
        how = f"no tokenizer of the model is on this disk: estimated, {owed.counting.told}; at most a token a byte"
    if owed.lengths:
        whose = "this section" if owed.lengths.own else "other sections"
        yield f"{how}; {owed.lengths.completion:,.1f} a reply, as in {owed.lengths.replies:,} replies to {whose}"
    else:
        yield f"{how}; how long replies are is not known yet: their most alone is told"
    yield f"{owed.shared:,} tokens of the prompts begin as an earlier one: a provider's cache may serve them"
    yield from _money(owed)
    if pace := _pace(owed):
        yield f"about {_time(owed.requests / pace)} at {pace:,.0f} replies a minute"
    for endpoint in owed.teacher.endpoint:
        yield from _privacy(endpoint)


def _pace(owed: Owed) -> float | None:
    """Replies a minute, as of late and as the endpoints' limits allow."""
    limits = [one.rpm * max(len(one.key_env), 1) if one.rpm else math.inf for one in owed.teacher.endpoint]
    return min(owed.pace, sum(limits)) if owed.pace else None


def _prices(owed: Owed) -> list[Price]:
    """The prices of all endpoints; none where one has none, or where they are in several currencies."""
    prices = [one.price for one in owed.teacher.endpoint]
    known = list(dict.fromkeys(price for price in prices if price))
    return known if all(prices) and len({price.currency for price in known}) == 1 else []


def _cost(owed: Owed, prompt: int, completion: int, cached: int = 0) -> Money | None:
    """What tokens cost, of several endpoints at the dearest."""
    usage = Usage(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion)
    return max((price.cost(usage) for price in _prices(owed)), default=None)


def _expected(owed: Owed) -> Money | None:
    prompt, completion = _prompt(owed), _completion(owed)
    return None if prompt is None or completion is None else _cost(owed, prompt, completion)


def _most(owed: Owed) -> Money | None:
    return None if owed.open_ended and owed.requests else _cost(owed, owed.prompt_most, owed.completion_most)


def _money(owed: Owed) -> Iterator[str]:
    prices = _prices(owed)
    if not prices:
        yield from _unpriced(owed)
        return
    expected, most = _expected(owed), _most(owed)
    parts = [f"{_told(money)} {what}" for money, what in ((expected, "expected"), (most, "at most")) if money]
    dearest = " (at the dearest price)" if len(prices) > 1 else ""
    yield (", ".join(parts) or "money not known: more requests may follow") + dearest
    prompt, completion = _prompt(owed), _completion(owed)
    if expected and prompt is not None and completion is not None and owed.shared:
        saved = expected.amount - (_cost(owed, prompt, completion, owed.shared) or expected).amount
        if saved:
            yield f"of that, a cache that serves all it can saves {_told(Money(saved, expected.currency))}"
    for price in prices:
        doubt = ", more than half a year ago: look it up again" if _today() - price.as_of > _OLD else ""
        yield f"price of {price.as_of}: {price.input:g} in, {price.output:g} out {price.currency} a million{doubt}"


def _unpriced(owed: Owed) -> Iterator[str]:
    endpoints = owed.teacher.endpoint
    if len({one.price.currency for one in endpoints if one.price}) > 1:
        yield "money not known: the endpoints' prices are in several currencies"
    for one in endpoints:
        if one.price is None and _is_here(one):
            yield f"no price: {one.name} runs on this machine"
        elif one.price is None:
            yield (
                f"price unknown: give teacher.endpoint.price of {one.name}:"
                " {currency: CNY, input: …, output: …, as_of: YYYY-MM-DD}, per million tokens"
            )


def _sums(found: Sequence[Owed]) -> Iterator[str]:
    """Money by currency, and what is not in it."""
    without = [o.section.name for o in found if not o.is_known or (o.requests and not (_prices(o) or _is_free(o)))]
    lacking = f"; without {', '.join(without)}" if without else ""
    known = [(owed, prices[0].currency) for owed in found if owed.is_known and (prices := _prices(owed))]
    for currency in dict.fromkeys(currency for _, currency in known):
        its = [owed for owed, own in known if own == currency]
        sums = [(_sum(map(_expected, its)), "expected"), (_sum(map(_most, its)), "at most")]
        if told := ", ".join(f"{_told(Money(amount, currency))} {what}" for amount, what in sums if amount is not None):
            yield f"all: {told}{lacking}"
    if any(owed.requests for owed in found):
        yield (
            "At most: each reply as long as max_tokens, and asked for once more where it can't be read. "
            "Sends that fail and are tried again come on top."
        )


def _sum(amounts: Iterable[Money | None]) -> float | None:
    """The sum, None where an amount is not known."""
    known = list(amounts)
    return sum(money.amount for money in known if money) if all(known) else None


def _caps(found: Sequence[Owed]) -> Iterator[str]:
    """Whether each cap suffices for its sections and those before them, which share it."""
    verdicts: dict[Money, str] = {}
    least = most = 0.0
    for owed in found:
        cap = owed.teacher.limit
        if not cap or not owed.is_known or "does not" in verdicts.get(cap, ""):
            continue
        likely, highest = _cost(owed, _prompt(owed) or owed.prompt, _completion(owed) or 0), _most(owed)
        least += likely.amount if likely else 0.0
        most += highest.amount if highest else math.inf
        left, reserve = cap.amount - owed.committed, owed.reserve.amount if owed.reserve else 0.0
        told = f"{_told(Money(left, cap.currency))} is left of it, and "
        if owed.requests and max(least, reserve) > left:
            what = "is expected" if owed.lengths else "or more is needed"
            why = f"{_told(Money(least, cap.currency))} {what} up to {owed.section.name}"
            if reserve > left:
                why = f"one request may cost {_told(Money(reserve, cap.currency))}"
            verdicts[cap] = f"does not suffice: {told}{why}; raise teacher.cap, or set limit"
        elif owed.requests or cap not in verdicts:
            known = f"the most is {_told(Money(most, cap.currency))}" if most < math.inf else "the most is not known"
            verdicts[cap] = f"{'suffices' if most + reserve <= left else 'may not suffice'}: {told}{known}"
    for cap, verdict in verdicts.items():
        yield f"the cap of {_told(cap)} {verdict}"


def _privacy(endpoint: EndpointConfig) -> Iterator[str]:
    """Where the text goes, and on whose word."""
    attested, host = zone(endpoint)
    if endpoint.privacy == "private" and not _is_inside(endpoint):
        yield (
            f"text would go to {host}, which is refused where that is outside, as the text is private: list the host"
            " under `inside` if it may see patients' text, or attest `privacy: public`"
        )
    else:
        yield f"text goes to {host} ({attested if host != 'this machine' else 'it leaves no machine'})"
    for variable in endpoint.key_env:
        if not os.environ.get(variable, "").strip():
            yield f"{endpoint.name} needs a key in the environment variable {variable}, which is not set"


def _is_inside(endpoint: EndpointConfig) -> bool:
    """Whether it is known, without asking anyone for an address, that private text may go there."""
    if endpoint.url is None or _is_here(endpoint):
        return True
    host = str(urlsplit(endpoint.url).hostname)
    if host in {name.lower() for name in endpoint.inside}:
        return True
    for entry in endpoint.inside:
        with suppress(ValueError):  # the others are names
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
    return False


def _is_here(endpoint: EndpointConfig) -> bool:
    host = urlsplit(endpoint.url or "//localhost").hostname
    with suppress(ValueError):
        return ipaddress.ip_address(str(host)).is_loopback
    return host == "localhost"


def _is_free(owed: Owed) -> bool:
    return all(one.price is None and _is_here(one) for one in owed.teacher.endpoint)


def _today() -> date:
    return datetime.now(UTC).date()


def _told(money: Money) -> str:
    amount = f"{money.amount:,.2f}" if abs(money.amount) >= 1 else f"{money.amount:.4g}"
    return f"{amount} {money.currency}"


def _time(minutes: float) -> str:
    hours, rest = divmod(max(round(minutes), 1), 60)
    return f"{hours} h {rest} min" if hours else f"{rest} min"
