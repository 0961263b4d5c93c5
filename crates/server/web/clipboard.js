import { h, icon, iconButton } from './element.js';

/** Puts text into the clipboard; answers whether it went. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages served over plain HTTP from another machine have no clipboard API.
    const area = document.body.appendChild(h('textarea', { value: text, className: 'unseen' }));
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    return done;
  }
}

/** A button that copies what `text()` gives and says that it did. */
export function copyButton(label, text) {
  const button = iconButton('copy', label, async () => {
    const done = await copy(text());
    button.replaceChildren(icon(done ? 'check' : 'close'));
    button.ariaLabel = button.title = done ? 'Copied' : 'The browser did not allow it';
    setTimeout(() => {
      button.replaceChildren(icon('copy'));
      button.ariaLabel = button.title = label;
    }, 1600);
  });
  return button;
}
