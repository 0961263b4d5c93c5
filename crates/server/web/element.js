/** Elements of the page. Text only ever becomes text nodes: nothing here, or anywhere, parses HTML. */

/** An element with properties (or attributes, where it has no such property) and children; strings become text. */
export function h(tag, props = {}, ...children) {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name in el) el[name] = value;
    else el.setAttribute(name, value);
  }
  el.append(...children);
  return el;
}

export const $ = (id) => document.getElementById(id);

const SVG = 'http://www.w3.org/2000/svg';

// Strokes on a square of 24.
const ICONS = {
  again: 'M19.5 12a7.5 7.5 0 1 1-2.2-5.3L20 9.4M20 4.5v5h-5',
  auto: 'M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16Zm0 0v16m3-15.4v14.8m3-12.2v9.6',
  bulb: 'M9.5 17.5h5M10.5 20.5h3M8 14a6 6 0 1 1 8 0c-.9.8-1.4 1.7-1.5 2.5h-5c-.1-.8-.6-1.7-1.5-2.5Z',
  check: 'M5 12.5l4.5 4.5L19 7.5',
  chevron: 'M9 6l6 6-6 6',
  close: 'M6 6l12 12M18 6L6 18',
  copy: 'M9 9h10v11H9zM15 9V4.5H5V15h4',
  dark: 'M19.5 14A8 8 0 0 1 10 4.5 8 8 0 1 0 19.5 14Z',
  down: 'M12 5v14M6 13l6 6 6-6',
  export: 'M12 4v11M7.5 10.5L12 15l4.5-4.5M5 20h14',
  import: 'M12 15V4M7.5 8.5L12 4l4.5 4.5M5 20h14',
  light: 'M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8ZM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4',
  menu: 'M4 7h16M4 12h16M4 17h10',
  pencil: 'M4.5 19.5l1-4L16 5l3 3L8.5 18.5zM14 7l3 3',
  plus: 'M12 5v14M5 12h14',
  send: 'M12 19V5M6 11l6-6 6 6',
  settings: 'M4 8h8M18 8h2M4 16h2M12 16h8M15 5.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5ZM9 13.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5Z',
  stop: 'M7.5 7.5h9v9h-9z',
  tool: 'M20.5 7.5l-3.2 3.2-3.5-.5-.5-3.5 3.2-3.2a5 5 0 0 0-6 6.5L4 16.5a2.5 2.5 0 0 0 3.5 3.5l6.5-6.5a5 5 0 0 0 6.5-6Z',
  trash: 'M5 7h14M10 7V4.5h4V7M7 7l.8 12.5h8.4L17 7M10.5 10.5v6M13.5 10.5v6',
};

/** A drawing that says nothing to screen readers. */
export function icon(name) {
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  svg.setAttribute('class', `icon icon-${name}`);
  const path = document.createElementNS(SVG, 'path');
  path.setAttribute('d', ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows a drawing and is called `label`. */
export function iconButton(name, label, onclick, props = {}) {
  return h('button', { type: 'button', className: 'quiet', title: label, 'aria-label': label, onclick, ...props }, icon(name));
}

/** Puts drawings where the page's HTML asks for them. */
export function drawIcons(root) {
  for (const el of root.querySelectorAll('[data-icon]')) el.prepend(icon(el.dataset.icon));
}
