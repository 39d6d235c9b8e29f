// Text of models onto the page: text nodes only, invisible control characters as labels.

const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;

function label(character) {
  return "U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
}

// Fill an element with a text. What could steer a terminal, or turn the reading direction of what
// stands around it, is shown by name instead.
export function fill(element, text) {
  const parts = [];
  let end = 0;
  const lines = text.replaceAll("\r\n", "\n");
  for (const found of lines.matchAll(CONTROLS)) {
    parts.push(document.createTextNode(lines.slice(end, found.index)));
    const mark = document.createElement("span");
    mark.className = "control";
    mark.textContent = label(found[0]);
    parts.push(mark);
    end = found.index + found[0].length;
  }
  parts.push(document.createTextNode(lines.slice(end)));
  element.replaceChildren(...parts);
}
