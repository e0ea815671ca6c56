"""``ranknas dashboard``: a study in optuna-dashboard."""

from __future__ import annotations

import errno
import ipaddress
import socket
import warnings
from collections.abc import Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna
import typer

from rankNAS.cli.documents import (
    load_study,
    open_recorded,
    study_document,
    without_passwords,
)
from rankNAS.cli.options.stored import parsing_context, read_options, study_folder
from rankNAS.cli.options.studies import DashboardOptions
from rankNAS.exceptions import UsageError
from rankNAS.reporting import figures
from rankNAS.reporting.metrics import metric_name, metric_text, quality_names

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["guarded", "note", "publish", "run_dashboard"]

NOTE = "*Renewed by `ranknas dashboard`; remove this line to keep a text of your own.*"


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # otherwise Ctrl-C would wait for open pages


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a page sends requests every few seconds."""


def run_dashboard(options: DashboardOptions) -> None:
    """Serve optuna-dashboard on a study, with our Pareto fronts and a note, until interrupted.

    Raises:
        UsageError: The extra is missing, the storage is not trusted, or the server cannot listen
            on the address.
        StudyError: The storage cannot be read.
    """
    searched, trust = read_options(study_folder(options.study, options.out)), options.trust_study
    storage = open_recorded(searched, trust=trust)
    found, host = load_study(searched, storage), options.host
    # Listen before the slow import below, so that a wrong port fails at once.
    with _listen(host, options.port) as server, warnings.catch_warnings():
        # Warnings inside the dashboard's libraries; the user cannot act on them.
        warnings.simplefilter("ignore")
        try:
            import optuna_dashboard
        except ImportError:
            raise UsageError(
                "`ranknas dashboard` needs optuna-dashboard: pip install 'ranknas[dashboard]'"
            ) from None
        with parsing_context(searched.folder / "result.json"):
            publish(found, without_passwords(study_document(searched, trust=trust)))
        app: WSGIApplication = optuna_dashboard.wsgi(storage)
        address = f"[{host}]" if ":" in host else host
        if _is_loopback(str(server.server_address[0])):
            server.set_app(guarded(app, host))
        else:
            server.set_app(app)
            typer.echo(
                f"ranknas: warning: {host} can be reached from other machines, and the dashboard "
                "has no password: whoever reaches it can change and delete studies.",
                err=True,
            )
        typer.echo(f"http://{address}:{server.server_port}/dashboard/  (Ctrl-C ends)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)


def guarded(app: WSGIApplication, host: str) -> WSGIApplication:
    """Reject requests whose Host header is no address of this machine (DNS rebinding protection).

    A foreign web page may resolve its own name to this machine. Its script could then read and
    change everything that a local browser can reach. The Host header contains that name.

    Args:
        app: The application that handles all other requests.
        host: A further accepted host name.
    """

    def solution(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        try:
            name = urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname or ""
            known = name in ("localhost", host) or _is_loopback(name)
        except ValueError:  # not an address
            known = False
        if known:
            return app(environ, start)
        start("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"Ask for localhost, not for another name of this machine.\n"]

    return solution


def publish(study: optuna.Study, document: dict[str, Any]) -> None:
    """Add to a study the names of its objectives, our Pareto-front figures, and a note.

    A note by another author is kept.

    Args:
        study: The Optuna study.
        document: Its result document.
    """
    from optuna.exceptions import ExperimentalWarning
    from optuna_dashboard import get_note, save_note, save_plotly_graph_object

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(document["objectives"])
    for i, figure in enumerate(figures.pareto(document)):
        figure.update_layout(
            title={"text": "Pareto front (RankNAS)"},
            margin={"t": 60},
            legend={"y": -0.2, "yanchor": "top"},
        )
        save_plotly_graph_object(study, figure, graph_object_id=f"ranknas-pareto-{i}")
    text, present = note(document), get_note(study)
    if text != present and (not present or NOTE in present):
        save_note(study, text)


def note(document: dict[str, Any]) -> str:
    """Summary of a study's results in Markdown."""
    lines = [f"{_plain(document['space'])} by {_plain(document['strategy'])}", ""]
    if not document["solutions"]:
        lines += ["The search has not ended.", ""]
    else:
        dense, metric = document["dense"], quality_names(document)[-1]
        lines += [f"| | {metric_name(metric)} | MACs kept | trial |", "|---|---|---|---|"]
        lines.append(f"| dense | {metric_text(dense[metric])} | 100 % | |")
        for solution in document["solutions"]:
            best, label = (
                solution["best"],
                solution["budget_key"] if solution["budget"] else "no budget",
            )
            kept = 100 * best["macs"] / dense["macs"]
            lines.append(
                f"| {_plain(label)} | {metric_text(best[metric])} | {kept:.1f} % | "
                f"{'uniform' if solution['trial'] is None else solution['trial']} |"
            )
        lines.append("")
    lines += ["Each parameter is a layer, its values are the choices of operator and rank.", ""]
    return "\n".join([*lines, NOTE])


def _plain(text: str) -> str:
    """A name escaped for Markdown."""
    return "`" + text.replace("`", "'").replace("|", "/").replace("\n", " ") + "`"


def _listen(host: str, port: int) -> _Server:
    """A bound server without an application."""
    try:
        return (_Server6 if ":" in host else _Server)((host, port), _Quiet)
    except OSError as error:
        raise UsageError(_why(error, host, port)) from None


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} of {host} is in use; give another one with --port, or --port 0 for a "
            "free one."
        )
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges; give one from 1024 with --port."
    return (
        f"`--host` must be an address of this machine, such as 127.0.0.1, got {host!r} "
        f"({error.strerror})."
    )


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
