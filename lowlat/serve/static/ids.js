// Random ids.

/** 96 random bits in hexadecimal; crypto.randomUUID would need https. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
