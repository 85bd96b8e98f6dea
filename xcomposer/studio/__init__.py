"""The web app: chat, webpages and articles in a browser."""
