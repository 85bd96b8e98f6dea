"""Pages from an instruction, a resume and a screenshot: `python examples/webpages.py [FOLDER]`, into this directory."""

import sys

from transformers import AutoModel, AutoTokenizer

import xcomposer  # noqa: F401  after it, a released folder loads as it is

folder = sys.argv[1] if len(sys.argv) > 1 else "demo"
model = AutoModel.from_pretrained(folder, dtype="auto").eval()
model.tokenizer = AutoTokenizer.from_pretrained(folder)
settings = dict(seed=202, max_new_tokens=1000)

# Without `output_path` each goes under its public name: Instruction-aware_Webpage_Generation.html and so on.
page = model.write_webpage("A page for Ada with a red title and a blue button.", output_path="page.html", **settings)
print(f"page.html: {len(page)} characters")
page = model.resume_2_webpage("demo/pictures/resume.md", output_path="resume.html", **settings)
print(f"resume.html: {len(page)} characters, {page.count('<script')} script elements")
page = model.screen_2_webpage("", ["demo/pictures/page.png"], output_path="screenshot.html", **settings)
print(f"screenshot.html: {len(page)} characters")
