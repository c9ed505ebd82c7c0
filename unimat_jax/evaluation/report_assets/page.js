"use strict";
/* What all parts of the page share: the data, elements made without HTML, and numbers as text. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const GENERATED = "generated";
const REFERENCE = "reference";

/** An element with properties or attributes and children. Texts become text nodes: no value is ever read as HTML. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** As `make`, for SVG, whose properties are all attributes. */
function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A section's heading with a quiet remark beside it. */
function heading(text, ...remark) {
  return make("div", { className: "heading" }, make("h2", {}, text), make("p", {}, ...remark));
}

function count(number) {
  return number.toLocaleString("en-US");
}

function percent(share, digits = 1) {
  return `${(100 * share).toFixed(digits)} %`;
}

/** Four significant digits without trailing zeros. */
function number(value) {
  return String(Number(value.toPrecision(4)));
}

/** A metric's value in its unit; shares are given in 0..1. */
function quantity(value, unit) {
  if (value === null || value === undefined) return "–";
  return unit === "%" ? (100 * value).toFixed(2) : number(value);
}

/** A long name that may break after each underscore. */
function breakable(name) {
  return name.split(/(?<=_)/).flatMap((part) => [part, make("wbr")]);
}
