"""The web app: chat, webpages and illustrated articles in a browser.

Logic that knows nothing of gradio: desk.py (what is asked of the model), line.py (who is next), workspace.py (one
visitor's files and work), conversation.py, pages.py, draft.py (the values of the three tabs), media.py, frame.py (the
sandbox of a page), endpoint.py (a model behind a server). On gradio: app.py, shell.py, chat.py, page.py, article.py;
sheet.* is the article's editor.
"""
