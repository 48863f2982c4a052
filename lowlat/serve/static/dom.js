// DOM helpers. Text becomes text nodes only: nothing but the sanitizer parses HTML, which the
// Content-Security-Policy enforces.

/**
 * An element with properties and children.
 *
 * `props`: `class`, `dataset` and `on` (event: listener) are treated by name, `aria-*`, `role` and
 * other dashed names become attributes, the rest are properties. Children: nodes or strings;
 * null, undefined and false are left out.
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === "class") element.className = value;
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "on") listen(element, value);
    else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child || child === 0 || child === ""));
  return element;
}

function listen(element, listeners) {
  for (const [event, listener] of Object.entries(listeners)) element.addEventListener(event, listener);
}

/** Makes `nodes` the children of `parent` without removing those already in place. */
export function arrange(parent, nodes) {
  const wanted = new Set(nodes);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  nodes.forEach((node, index) => {
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
  });
}

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M5 12l7-7 7 7",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v10H9zM5 15V5h10",
  check: "M5 13l4 4L19 7",
  retry: "M20 11a8 8 0 1 0-2.3 6.3M20 4v7h-7",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  menu: "M4 7h16M4 12h16M4 17h16",
  more: "M5.5 11.5h1v1h-1zM11.5 11.5h1v1h-1zM17.5 11.5h1v1h-1z",
  sliders: "M3 7h10M19 7h2M3 17h2M11 17h10M13 7a3 3 0 1 0 6 0 3 3 0 1 0-6 0M5 17a3 3 0 1 0 6 0 3 3 0 1 0-6 0",
  help: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18M9.5 9.5a2.5 2.5 0 1 1 3.6 2.2c-.8.4-1.1.9-1.1 1.8M12 16.8h.01",
  light:
    "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v2M12 20v2M2 12h2M20 12h2" +
    "M5 5l1.4 1.4M17.6 17.6L19 19M5 19l1.4-1.4M17.6 6.4L19 5",
  dark: "M20 14.5A8.5 8.5 0 1 1 9.5 4a7 7 0 0 0 10.5 10.5z",
  auto: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18M12 3v18M12 7h5.5M12 11h9M12 15h8",
  close: "M6 6l12 12M18 6L6 18",
  left: "M14.5 6l-6 6 6 6",
  right: "M9.5 6l6 6-6 6",
  play: "M8 5l11 7-11 7z",
  file: "M7 3h7l4 4v14H7zM14 3v4h4",
  attach: "M19 11l-7.5 7.5a4.5 4.5 0 0 1-6.4-6.4L13 4.4a3 3 0 0 1 4.2 4.2L9.5 16.3a1.5 1.5 0 0 1-2.1-2.1L14 7.5",
  import: "M12 4v11M7 10l5 5 5-5M5 20h14",
  export: "M12 15V4M7 9l5-5 5 5M5 20h14",
  trash: "M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13",
  tool: "M14 6a4 4 0 0 1 5-1l-3 3 1 2 2 1 3-3a4 4 0 0 1-6 5l-7 7-3-3 7-7a4 4 0 0 1 1-4z",
};

/** A 24x24 icon, hidden from screen readers: the control has a label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon; `label` is its name, shown next to the icon with `text`. */
export function iconButton(name, label, onClick, { text = false, class: extra = "" } = {}) {
  return h(
    "button",
    {
      type: "button",
      class: `${text ? "text-button" : "icon-button"} ${extra}`.trim(),
      title: text ? undefined : label,
      "aria-label": text ? undefined : label,
      on: { click: onClick },
    },
    icon(name),
    text ? label : null,
  );
}

/** Copies text to the clipboard; false if the browser refuses. */
export async function copyText(text) {
  // The clipboard API exists only on https and loopback; elsewhere use the deprecated command.
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return false; // permission refused: the caller shows it
    }
  }
  const area = h("textarea", { value: text, class: "visually-hidden", "aria-hidden": "true" });
  const before = document.activeElement;
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  before?.focus();
  return isCopied;
}

/** A button that copies `read()` and confirms it for two seconds. */
export function copyButton(label, read, options = {}) {
  const button = iconButton("copy", label, async () => {
    const isCopied = await copyText(read());
    show(isCopied ? "check" : "close", isCopied ? "Copied" : "Copying was refused");
    setTimeout(() => show("copy", label), 2000);
  }, options);
  function show(name, text) {
    button.replaceChildren(icon(name), ...(options.text ? [text] : []));
    if (!options.text) {
      button.title = text;
      button.setAttribute("aria-label", text);
    }
  }
  return button;
}
