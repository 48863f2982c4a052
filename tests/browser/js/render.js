// The outline of a markdown text on the page, shown at once or cut by cut. Leaves out the heads of
// code blocks and all attributes but those that matter.
async ([text, cuts]) => {
  const { MarkdownView } = await import("/static/markdown_view.js");
  const element = document.createElement("div");
  document.body.append(element);
  const view = new MarkdownView(element);
  for (const cut of cuts) view.update(text.slice(0, cut));
  view.update(text, { isComplete: true });
  const KEPT = ["href", "start", "class", "checked"];
  const outline = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    const name = node.localName;
    if (node.className === "code-head") return "";
    if (node.className === "katex" || node.className === "katex-display") return node.querySelector("annotation").textContent;
    let attributes = "";
    for (const { name, value } of node.attributes) {
      if (KEPT.includes(name) && value !== "left") attributes += ` ${name}=${value}`;
    }
    return `<${name}${attributes}>${[...node.childNodes].map(outline).join("")}</${name}>`;
  };
  const result = [...element.childNodes].map(outline).join("");
  element.remove();
  return result;
}
