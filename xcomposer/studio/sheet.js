// The article's editor. `props.value` is the whole state, made by the server; what is done here is told with
// trigger("act", ...) (by hand, at once) or trigger("ask", ...) (by the model). Text is only ever set as text.
const sheet = element.querySelector('.sheet'), bar = element.querySelector('.sheet-bar');
let view = {blocks: [], texts: {}}, open = null; // open: {id, how}, the block whose note for the model is being written

const make = (tag, properties = {}, children = []) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter(Boolean));
  return node;
};
const button = (key, action, more = {}) => make('button', {
  type: 'button', textContent: more.icon || view.texts[key], title: view.texts[key], ariaLabel: view.texts[key],
  disabled: more.disabled ?? view.busy, onclick: action, className: more.className || '',
});
const act = (what, block, values = {}) => trigger('act', {do: what, block: block || '', ...values});
const ask = (what, block, note = '') => { open = null; trigger('ask', {do: what, block, note}); };

// A text that is typed in place: told when it is left, and only if it changed.
const editable = (className, label, text, told, key) => {
  const node = make('div', {className, textContent: text, ariaLabel: label, key});
  node.setAttribute('role', 'textbox');
  node.contentEditable = view.busy ? 'false' : 'plaintext-only';
  node.said = text;
  node.tell = () => {
    const now = node.innerText.replace(/\u00a0/g, ' ').trim();
    if (now !== node.said.trim()) { node.said = now; told(now); }
  };
  node.onblur = node.tell;
  node.onkeydown = (event) => { if (event.key === 'Escape') { node.textContent = node.said; node.blur(); } };
  return node;
};

const noteForm = (block) => {
  const input = make('input', {
    type: 'text', placeholder: view.texts.note, ariaLabel: view.texts.note, value: open.note || '',
    oninput: () => { open.note = input.value; },
  });
  const go = () => ask(open.how, block.id, input.value);
  input.onkeydown = (event) => {
    if (event.key === 'Enter') go();
    if (event.key === 'Escape') { open = null; render(); }
  };
  setTimeout(() => input.focus());
  return make('div', {className: 'note-form'}, [
    input, button(open.how, go, {className: 'primary'}), button('discard', () => { open = null; render(); }),
  ]);
};

const ghostOf = (ghost) => make('div', {className: 'ghost'}, [
  ghost.old && make('div', {className: 'old', ariaLabel: view.texts.before}, [
    make('small', {textContent: view.texts.before}), make('p', {textContent: ghost.old}),
  ]),
  make('div', {className: 'new', ariaLabel: view.texts.after}, [
    make('small', {textContent: view.texts[ghost.how]}), make('p', {textContent: ghost.new || '…'}),
  ]),
  make('div', {className: 'row'}, ghost.done ? [
    button('keep', () => act('keep', ghost.block), {className: 'primary', disabled: false}),
    button('discard', () => act('discard', ghost.block), {disabled: false}),
  ] : []),
]);

const moves = (block, at) => [
  button('up', () => act('up', block.id), {icon: '↑', disabled: view.busy || at === 0}),
  button('down', () => act('down', block.id), {icon: '↓', disabled: view.busy || at === view.blocks.length - 1}),
  button('delete', () => act('delete', block.id), {icon: '✕'}),
];
const tools = (children) => {
  const node = make('div', {className: 'tools'}, children);
  node.setAttribute('role', 'toolbar');
  return node;
};

const paragraph = (block, at) => {
  const edits = ['rewrite', 'expand', 'shorten', 'insert'].map((how) => button(how, () => {
    if (how === 'shorten') ask(how, block.id); else { open = {id: block.id, how}; render(); }
  }));
  const number = view.blocks.slice(0, at + 1).filter((each) => each.kind === 'text').length;
  const ghost = view.ghost && view.ghost.block === block.id ? view.ghost : null;
  return make('section', {className: 'block text'}, [
    ghost && ghost.old ? null : editable('para', `${view.texts.paragraph} ${number}`, block.text,
      (text) => act('text', block.id, {text}), block.id),
    ghost && ghostOf(ghost),
    tools([...edits, make('i'), button('add_paragraph', () => act('paragraph', block.id), {icon: '¶+'}),
      button('add_picture', () => act('place', block.id), {icon: '▣+'}), ...moves(block, at)]),
    open && open.id === block.id && noteForm(block),
  ]);
};

const choosePicture = (block) => {
  const input = make('input', {type: 'file', accept: 'image/*'});
  input.onchange = () => {
    const reader = new FileReader(), file = input.files[0];
    reader.onload = () => act('upload', block.id, {name: file.name, data: reader.result});
    if (file) reader.readAsDataURL(file);
  };
  input.click();
};

const place = (block, at) => make('section', {className: 'block place'}, [
  make('figure', {}, [
    block.src ? make('img', {src: block.src, alt: block.caption})
      : make('div', {className: 'hole', textContent: view.texts.missing}),
    editable('caption', view.texts.caption, block.caption, (text) => act('caption', block.id, {text}),
      block.id),
  ]),
  block.candidates.length > 1 && make('div', {className: 'candidates'}, block.candidates.map((each, rank) => make('button', {
    type: 'button', className: each.id === block.picture ? 'picked' : '', disabled: view.busy,
    ariaLabel: `${view.texts.candidates} ${rank + 1}`, onclick: () => act('pick', block.id, {picture: each.id}),
  }, [make('img', {src: each.src, alt: ''})]))),
  tools([button('ask_caption', () => ask('caption', block.id)), button('ask_choice', () => ask('choose', block.id)),
    button('upload', () => choosePicture(block)),
    block.picture && button('remove', () => act('remove', block.id)), make('i'), ...moves(block, at)]),
]);

function render() {
  bar.replaceChildren(
    button('undo', () => act('undo'), {icon: '↶', disabled: view.busy || !view.undo}),
    button('redo', () => act('redo'), {icon: '↷', disabled: view.busy || !view.redo}),
  );
  sheet.ariaBusy = String(!!view.busy);
  if (!view.blocks.length && !view.title) {
    sheet.replaceChildren(make('div', {className: 'empty'}, [
      make('h3', {textContent: view.texts.sheet_empty}), make('p', {textContent: view.texts.sheet_empty_more}),
    ]));
    return;
  }
  const bottom = sheet.scrollHeight - sheet.scrollTop - sheet.clientHeight < 60;
  sheet.replaceChildren(
    editable('heading', view.texts.title, view.title, (text) => act('title', '', {text}), 'title'),
    ...view.blocks.map((block, at) => (block.kind === 'text' ? paragraph : place)(block, at)),
  );
  if (view.busy && bottom) sheet.scrollTop = sheet.scrollHeight;
}

// What is being typed while a state comes stays, with its caret: it is told when it is left.
function keepTyping(draw) {
  const old = document.activeElement;
  if (!old?.key || !sheet.contains(old) || view.busy) return draw();
  const caret = document.createRange(), at = getSelection(), typed = old.innerText;
  caret.setStart(old, 0);
  if (old.contains(at.focusNode)) caret.setEnd(at.focusNode, at.focusOffset);
  const length = caret.toString().length, changed = typed.trim() !== old.said.trim();
  old.onblur = null;
  draw();
  const node = [...sheet.querySelectorAll('[role=textbox]')].find((each) => each.key === old.key);
  if (!node) return;
  if (changed) node.textContent = typed;
  node.focus();
  if (node.firstChild) at.collapse(node.firstChild, Math.min(length, node.firstChild.length));
}

function take() {
  if (!props.value?.texts || props.value.number < view.number) return; // one that came late
  view = props.value;
  keepTyping(render);
  if (view.json !== undefined) localStorage.setItem('xcomposer-article', view.json);
}

sheet.addEventListener('keydown', (event) => {
  if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== 'z') return;
  const typing = document.activeElement;
  if (typing && typing.said !== undefined && typing.innerText.trim() !== typing.said.trim()) return; // the browser's own
  event.preventDefault();
  act(event.shiftKey ? 'redo' : 'undo');
});
watch('value', take);
take();
