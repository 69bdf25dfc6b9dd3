// Native controls from a description: labels, keyboard and screen readers work as the browser has them.
const WAIT = 70; // ms between two messages of a control that is being dragged
const LOST = 10000; // ms after which a message that nobody answered no longer holds up the next one

function make(tag, attributes = {}, text = null) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  if (text !== null) node.textContent = text;
  return node;
}

export function render({ model, el }) {
  const id = `f${Math.random().toString(36).slice(2, 9)}`;
  const form = make("form", { "aria-label": model.label });
  form.addEventListener("submit", (event) => event.preventDefault());
  const controls = new Map();
  let touched = null;

  // One message at a time: a server with several threads may deal with two in either order, and the older of two
  // positions would be the one that stays. What is moved meanwhile waits here, and only its last position is sent.
  const queue = [];
  let timer = null, sent = 0, flight = 0, count = model.settled;
  // What each control last asked for, and the number of that message. An answer to an older one is no news: taking it
  // would put the control back below a hand that is still moving it.
  const asked = new Map();
  function post(message, now) {
    queue.push(message);
    pump(now);
  }
  function send(name, value, now) {
    const last = asked.get(name);
    // A key press is told twice: as a move and, when the key goes up, as a choice.
    if (last?.count > model.settled && String(last.value) === String(value)) return pump(now);
    if (queue.at(-1)?.set === name) queue.pop();
    asked.set(name, { count: Infinity, value });
    post({ set: name, value }, now);
  }
  function pump(now) {
    clearTimeout(timer);
    if (flight > model.settled) {
      timer = setTimeout(() => { flight = 0; pump(); }, LOST);
      return;
    }
    if (!queue.length) return;
    const left = WAIT - (performance.now() - sent);
    if (!now && left > 0) {
      timer = setTimeout(pump, left);
      return;
    }
    const message = queue.shift();
    sent = performance.now();
    flight = ++count;
    if (message.set && !queue.some((later) => later.set === message.set)) asked.get(message.set).count = count;
    model.send_msg({ ...message, count });
    if (queue.length) pump();
  }

  const logarithmic = (field) => field.scale === "log";
  const position = (field, value) => (logarithmic(field) ? 200 * Math.log(value / field.min) / Math.log(field.max / field.min) : value);
  function fromPosition(field, at) {
    if (!logarithmic(field)) return Number(at);
    const raw = field.min * (field.max / field.min) ** (at / 200);
    return Math.min(field.max, Math.max(field.min, Number(raw.toPrecision(2))));
  }
  const shown = (field, value) => (logarithmic(field) ? String(Number(Number(value).toPrecision(3))) : Number(value).toFixed(field.digits));

  function range(field, box) {
    const log = logarithmic(field);
    const input = make("input", {
      type: "range", id: `${id}-${field.name}`, name: field.name,
      min: log ? 0 : field.min, max: log ? 200 : field.max, step: log ? 1 : field.step,
      "aria-describedby": field.help ? `${id}-${field.name}-help` : null,
    });
    // Not an <output>: that announces itself, and aria-valuetext already says the same.
    const output = make("span", { class: "value", "aria-hidden": "true" });
    box.append(make("label", { for: input.id }, field.label), output, input);
    const say = (value) => {
      output.textContent = shown(field, value);
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", () => {
      const value = fromPosition(field, input.value);
      touched = field.name;
      say(value);
      send(field.name, value, false);
    });
    input.addEventListener("change", () => {
      touched = null;
      send(field.name, fromPosition(field, input.value), true);
    });
    return { inputs: [input], set: (value) => { if (touched !== field.name) { input.value = position(field, value); say(value); } } };
  }

  function number(field, box) {
    const input = make("input", {
      type: "number", id: `${id}-${field.name}`, name: field.name, min: field.min, max: field.max, step: "any",
      inputmode: "decimal", "aria-describedby": field.help ? `${id}-${field.name}-help` : null,
    });
    box.append(make("label", { for: input.id }, field.label), input);
    // The server judges the value, so that a bad one gets the same sentence as in the address.
    input.addEventListener("change", () => send(field.name, input.value, true));
    return { inputs: [input], set: (value) => { if (el.getRootNode().activeElement !== input || Number(input.value) !== value) input.value = value; } };
  }

  function choice(field, box) {
    const select = make("select", { id: `${id}-${field.name}`, name: field.name, "aria-describedby": field.help ? `${id}-${field.name}-help` : null });
    for (const option of field.choices) select.append(make("option", { value: option.value }, option.label));
    box.append(make("label", { for: select.id }, field.label), select);
    select.addEventListener("change", () => send(field.name, select.value, true));
    return { inputs: [select], set: (value) => { select.value = String(value); } };
  }

  function segments(field, box) {
    const label = make("span", { class: "label", id: `${id}-${field.name}-label` }, field.label);
    const group = make("div", { class: "segments", role: "radiogroup", "aria-labelledby": label.id });
    const inputs = field.choices.map((option) => {
      const part = make("label", { title: option.help });
      const input = make("input", { type: "radio", name: `${id}-${field.name}`, value: option.value });
      input.addEventListener("change", () => send(field.name, option.value, true));
      part.append(input, make("span", {}, option.label));
      group.append(part);
      return input;
    });
    box.append(label, group);
    return { inputs, set: (value) => { for (const input of inputs) input.checked = input.value === String(value); } };
  }

  function several(field, box) {
    const label = make("span", { class: "label", id: `${id}-${field.name}-label` }, field.label);
    const group = make("div", { class: "several", role: "group", "aria-labelledby": label.id });
    const inputs = field.choices.map((option) => {
      const part = make("label");
      const input = make("input", { type: "checkbox", name: `${id}-${field.name}`, value: option.value });
      input.addEventListener("change", () => send(field.name, inputs.filter((each) => each.checked).map((each) => each.value), true));
      part.append(input, make("span", {}, option.label));
      group.append(part);
      return input;
    });
    box.append(label, group);
    return { inputs, set: (value) => { for (const input of inputs) input.checked = value.map(String).includes(input.value); } };
  }

  const kinds = { range, number, choice, segments, several };
  function build() {
    // Who moves a control by keyboard must find the focus where it was.
    const focused = el.getRootNode().activeElement;
    const [held] = [...controls].map(([name, { inputs }]) => [name, inputs.indexOf(focused)]).filter(([, at]) => at >= 0);
    controls.clear();
    touched = null;
    form.replaceChildren();
    if (model.actions.length) form.append(actions);
    for (const field of model.fields) {
      const box = make("div", { class: "field" });
      const control = kinds[field.kind](field, box);
      if (field.help) box.append(make("span", { class: "help", id: `${id}-${field.name}-help` }, field.help));
      controls.set(field.name, { ...control, box });
      form.append(box);
    }
    update(true);
    enable();
    if (held) controls.get(held[0])?.inputs[held[1]]?.focus({ preventScroll: true });
  }
  // What holds, except where the server has yet to hear what was asked for last; a new control shows that.
  function update(fresh) {
    for (const [name, value] of Object.entries(model.values)) {
      const last = asked.get(name);
      const pending = last?.count > model.settled;
      if (!pending || fresh) controls.get(name)?.set(pending ? last.value : value);
    }
  }
  function enable() {
    for (const [name, control] of controls) {
      const off = model.disabled.includes(name);
      control.box.classList.toggle("off", off);
      for (const input of control.inputs) input.disabled = off;
    }
  }

  const actions = make("div", { class: "actions" });
  const buttons = new Map();
  function act() {
    for (const action of model.actions) {
      let button = buttons.get(action.name);
      if (!button) {
        button = make("button", { type: "button" });
        button.addEventListener("click", () => post({ action: action.name }, true));
        buttons.set(action.name, button);
        actions.append(button);
      }
      // A focused button that is switched off would drop the focus to the top of the page.
      if (action.disabled && button.matches(":focus")) {
        button.disabled = true;
        const next = model.actions.find((other) => !other.disabled && buttons.get(other.name));
        if (next) { buttons.get(next.name).disabled = false; buttons.get(next.name).focus(); }
      }
      button.disabled = action.disabled;
      button.className = action.primary ? "primary" : "";
      button.textContent = action.label;
    }
  }

  build();
  act();
  el.append(form);
  model.on("fields", build);
  model.on("values", () => update(false));
  model.on("settled", () => { pump(); update(false); });
  model.on("disabled", enable);
  model.on("actions", act);
  // In a notebook, what the server sent before its channel to this page stood is lost: ask until an answer comes.
  let tries = 0;
  const ask = () => {
    if (model.answered || tries++ > 60) return;
    model.send_msg({ ready: true });
    setTimeout(ask, 500);
  };
  ask();
}
