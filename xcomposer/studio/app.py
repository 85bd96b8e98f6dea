"""The studio: chat, pages and illustrated articles in a browser.

    xcomposer studio --model FOLDER
    xcomposer studio --model FOLDER --pictures PHOTOS --host 0.0.0.0 --auth me:secret
    xcomposer studio --endpoint http://127.0.0.1:8000

It serves http://127.0.0.1:7860, to this machine alone, unless --host says otherwise. One answer is written at a time;
who waits sees the place in the queue.
"""

import argparse
import atexit
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xcomposer.loading import arguments, check_folder, load

FILES = Path(__file__).parent
LOCAL = ("127.0.0.1", "localhost", "::1")
SWEEP_S, KEEP_S = 600, 3600  # uploads are looked through every so often, and deleted when so old
INSTALL = "pip install 'internlm-xcomposer2d5[studio]'"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, max_new_tokens=1024, command="studio", example="--model demo --port 7860")
    add = parser.add_argument
    add("--endpoint", metavar="URL", help="ask a server of the OpenAI interface, and load no model here")
    add("--api_key", default=os.environ.get("OPENAI_API_KEY", ""), help="of the endpoint, if it wants one")
    add("--host", default="127.0.0.1", help="0.0.0.0 opens the studio to the network")
    add("--port", type=int, default=7860)
    add("--share", action="store_true", help="a public address through gradio's servers")
    add("--auth", metavar="USER:PASSWORD", help="ask visitors to sign in")
    add("--pictures", type=Path, metavar="FOLDER", help="pictures that articles may be illustrated with")
    add("--max_upload", type=float, default=64, metavar="MB", help="of one file (default: 64)")
    add(
        "--allow-addresses",
        action=argparse.BooleanOptionalAction,
        help="fetch pictures from addresses that visitors give (default: only while this machine alone is served)",
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Wrong options, before anything is loaded. Raises: SystemExit: says which."""
    if not 0 <= args.port < 65536:
        raise SystemExit(f"--port {args.port}: give a number from 0 to 65535")
    if not args.max_upload > 0:
        raise SystemExit(f"--max_upload {args.max_upload}: give a number of megabytes above 0")
    if args.auth is not None and not all(args.auth.partition(":")):
        raise SystemExit("--auth: give USER:PASSWORD")
    if args.pictures is not None:
        from xcomposer.article.pictures import in_folder

        try:
            in_folder(args.pictures)
        except (ValueError, OSError) as error:
            raise SystemExit(f"--pictures: {error}") from error


def build(desk: Any, workspaces: Any, pictures: Path | None = None, addresses: bool = False):
    """The page: a header and three tabs."""
    import gradio as gr

    from xcomposer.studio.article import ArticleTab
    from xcomposer.studio.chat import ChatTab
    from xcomposer.studio.page import PageTab
    from xcomposer.studio.shell import Shell

    with gr.Blocks(title="XComposer Studio", fill_width=True, delete_cache=(SWEEP_S, KEEP_S)) as app:
        shell = Shell(desk, workspaces, pictures, addresses)
        shell.header()
        with gr.Tabs(elem_classes="tabs"):
            ChatTab(shell)
            PageTab(shell)
            ArticleTab(shell)
        shell.footer(app)
    return app


def theme():
    """Quiet: one accent, the system's fonts (nothing is fetched), both colour schemes."""
    import gradio as gr

    sans = "system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"
    mono = "ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"
    look = gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=sans, font_mono=mono)
    both = {
        "body_background_fill": "*neutral_50",
        "block_title_background_fill": "transparent",
        "block_title_text_color": "*body_text_color_subdued",
        "block_label_background_fill": "transparent",
        "block_label_text_color": "*body_text_color_subdued",
        "block_border_width": "1px",
        "block_shadow": "none",
        "input_border_width": "1px",
        "input_shadow": "none",
        "button_border_width": "1px",
        "button_secondary_background_fill": "*background_fill_primary",
        "button_secondary_border_color": "*border_color_primary",
        "button_secondary_shadow": "none",
        "button_primary_shadow": "none",
    }
    dark = {f"{name}_dark": value for name, value in both.items() if hasattr(look, f"{name}_dark")}
    dark["body_background_fill_dark"] = "*neutral_950"
    return look.set(block_title_padding="0", block_title_text_weight="500", **both, **dark)


def launch(app: Any, args: argparse.Namespace, **options: Any):
    """Start the server; returns what gradio's `launch` does."""
    return app.queue(default_concurrency_limit=8).launch(
        server_name=args.host,
        server_port=args.port or None,
        share=args.share,
        auth=tuple(args.auth.split(":", 1)) if args.auth else None,
        max_file_size=int(args.max_upload * 2**20),
        theme=theme(),
        css_paths=[FILES / "studio.css"],
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        _frontend=False,  # no question to its own address, whose answer may be late on a busy machine or go to a proxy
        **options,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    check(args)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401  before the model: its absence shows at once
    except ImportError as error:
        print(f"the studio needs gradio ({error}): {INSTALL}", file=sys.stderr)
        return 1
    from xcomposer.studio.desk import About, Desk

    try:
        if args.endpoint:
            from xcomposer.studio.endpoint import Endpoint

            desk = Desk(Endpoint(args.endpoint, args.api_key), About(args.endpoint), args.max_new_tokens)
        else:
            check_folder(args.model)
            desk = Desk(None, About.of_folder(args.model), args.max_new_tokens)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return serve(desk, args)


def fetches_addresses(args: argparse.Namespace) -> bool:
    """Whether visitors may have this machine fetch from addresses: by option, else if they can only be on it."""
    return args.host in LOCAL and not args.share if args.allow_addresses is None else args.allow_addresses


def serve(desk: Any, args: argparse.Namespace) -> int:
    """Open the page, load the model behind it, and stay until Ctrl-C. Returns the exit status."""
    from xcomposer.studio.workspace import Workspaces

    workspaces = Workspaces()
    atexit.register(workspaces.close_all)
    app = build(desk, workspaces, args.pictures, fetches_addresses(args))
    try:
        launch(app, args, prevent_thread_lock=True)
    except OSError as error:  # the port is taken
        print(f"error: {error}; choose another --port", file=sys.stderr)
        return 1
    try:
        if not args.endpoint:
            desk.open(load(args)[0])  # who asks before it is there sees that it is being loaded
        app.block_thread()
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        desk.close()
        app.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
