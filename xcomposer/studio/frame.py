"""A page in a frame that reaches nothing: not this app, not the network. Pure.

Two sandboxed frames, one in the other. The outer one holds the policy, which the inner one, the page, inherits and can
not leave: a policy inside the page alone would end where the page sends its window to another address.
"""

import html
import re

SANDBOX = "allow-scripts allow-modals"
WIDTHS = {"phone": "390px", "tablet": "768px", "desktop": "100%"}
_LOADED = re.compile(
    r"""(?:(?:src|href)\s*=\s*["']?|url\(\s*["']?|@import\s+["'])(?:https?:)?//([\w.-]+(?::\d+)?)""", re.I
)
_TITLE = re.compile(r"<(title|h1)\b[^>]*>(.*?)</\1\s*>", re.I | re.DOTALL)
_FENCED = re.compile(r"\A\s*```(?:html)?\s*\n(.*?)(?:\n```\s*)?\Z", re.DOTALL)


def hosts_of(page: str) -> list[str]:
    """Hosts that the page would load scripts, styles or pictures from."""
    return sorted({host.lower().rstrip(".") for host in _LOADED.findall(page)})


def title_of(page: str) -> str:
    """The page's title, or its first heading; "" for neither."""
    found = _TITLE.search(page)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", found[2])).split()) if found else ""


def code_of(answer: str) -> str:
    """The page in an answer: a fence of Markdown around it is no part of it."""
    fenced = _FENCED.match(answer)
    return fenced[1] if fenced else answer


def policy(hosts: tuple[str, ...] = ()) -> str:
    """The outer frame's content policy: nothing from the network, but for scripts, styles and pictures of `hosts`."""
    allowed = "".join(f" https://{host}" for host in hosts)
    return (
        f"default-src 'none'; script-src 'unsafe-inline'{allowed}; style-src 'unsafe-inline'{allowed}; "
        f"img-src data: blob:{allowed}; font-src data:{allowed}; frame-src 'none'; form-action 'none'"
    )


def sandboxed(page: str, hosts: tuple[str, ...] = ()) -> str:
    """The document of the outer frame, with the page in the inner one."""
    return (
        f'<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy(hosts)}">'
        "<style>html,body,iframe{margin:0;border:0;width:100%;height:100%;display:block;background:white}</style>"
        f'<iframe title="page" sandbox="{SANDBOX}" srcdoc="{html.escape(page)}"></iframe>'
    )


def preview(page: str, device: str = "desktop", hosts: tuple[str, ...] = ()) -> str:
    """The page at a device's width, as HTML for the app."""
    if not page.strip():
        return ""
    return (
        f'<div class="device {device}" style="max-width:{WIDTHS[device]}"><iframe title="preview" sandbox="{SANDBOX}" '
        f'srcdoc="{html.escape(sandboxed(page, hosts))}"></iframe></div>'
    )


def window(page: str, hosts: tuple[str, ...] = ()) -> str:
    """A document for a window of its own: the page, as far from the app as in the preview."""
    title = html.escape(title_of(page) or "Page")
    return (
        f'<!DOCTYPE html><meta charset="utf-8"><title>{title}</title>'
        "<style>html,body,iframe{margin:0;border:0;width:100%;height:100%;display:block}</style>"
        f'<iframe title="preview" sandbox="{SANDBOX}" srcdoc="{html.escape(sandboxed(page, hosts))}"></iframe>'
    )
