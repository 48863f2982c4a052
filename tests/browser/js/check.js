// What each text made that markdown has no use for, and whether any of it ran.
async (texts) => {
  const { MarkdownView } = await import("/static/markdown_view.js");
  const element = document.createElement("div");
  document.body.append(element);
  const bad = [];
  const TAGS = ["p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "br", "em", "strong", "s",
    "code", "pre", "a", "table", "thead", "tbody", "tr", "th", "td", "div", "span", "button", "svg", "path", "input"];
  const ATTRIBUTES = ["class", "href", "rel", "target", "tabindex", "role", "aria-label", "aria-hidden", "start",
    "type", "disabled", "data-level", "viewBox", "d", "checked"];
  for (const text of texts) {
    element.replaceChildren();
    new MarkdownView(element).update(text, { isComplete: true });
    // Of KaTeX: MathML and spans, whose styles are lengths and colours.
    for (const math of element.querySelectorAll(".katex")) {
      for (const node of math.querySelectorAll("*")) {
        if (/^(script|iframe|img|object|embed|form|a|input|style)$/.test(node.localName)) bad.push([text, node.localName]);
        for (const { name, value } of node.attributes) {
          if (/^on|href|src/.test(name) || /url\(/.test(value)) bad.push([text, name]);
        }
      }
      math.remove();
    }
    for (const node of element.querySelectorAll("*")) {
      if (!TAGS.includes(node.localName)) bad.push([text, node.localName]);
      for (const { name, value } of node.attributes) {
        if (!ATTRIBUTES.includes(name)) bad.push([text, name]);
        if (name === "href" && !/^(https?:\/\/|mailto:)/i.test(value)) bad.push([text, value]);
      }
      if (node.localName === "a") {
        if (node.rel !== "noopener noreferrer nofollow" || node.target !== "_blank") bad.push([text, node.rel]);
        if (/^(javascript|data|vbscript):$/.test(node.protocol)) bad.push([text, node.href]);
      }
    }
  }
  element.remove();
  await new Promise((resolve) => setTimeout(resolve, 100));
  return [bad, window.pwned];
}
